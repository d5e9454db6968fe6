"""Small indexes for tests: documents about animals and places, and a tiny embedder."""

from pathlib import Path

import numpy as np
import torch
from embedder_samples import save_by_sentence_transformers
from mining_samples import ANIMALS, PLACES, write_jsonl
from tiny_models import tiny_bert

from rag_retrieval.retrieval.candidates import Candidates
from rag_retrieval.retrieval.index import Index

QUERIES = ["which panda lives near a river", "the tiger sleeps", "大熊猫吃什么", "zebra"]
CHINESE = {"z1": "大熊猫主要吃竹子", "z2": "北京是中国的首都"}


ALL = ("dense", "lexical", "multi_vector")


def m3_folder(root: Path, width: int = 16) -> str:
    """A tiny model in the layout of bge-m3, which gives all three representations; token vectors of `width` numbers."""
    folder = root / "m3"
    save_by_sentence_transformers(tiny_bert(root / "bert"), folder, "cls", {"query": "query: "})
    generator = torch.Generator().manual_seed(0)
    for name, outputs, mean in (("colbert_linear", width, 0.1), ("sparse_linear", 1, 2.0)):
        weight, bias = torch.randn(outputs, 32, generator=generator) / 4, torch.full((outputs,), mean)
        torch.save({"weight": weight, "bias": bias}, folder / f"{name}.pt")
    return str(folder)


def documents(kind: str = "lives") -> list[dict]:
    """36 of them, and two in Chinese."""
    rows = [
        {"_id": f"{animal}-{place}", "text": f"The {animal} {kind} at the {place}.", "metadata": {"animal": animal}}
        for animal in ANIMALS for place in PLACES
    ]  # fmt: skip
    return rows + [{"_id": id_, "text": text} for id_, text in CHINESE.items()]


def corpus_file(path: Path, rows: list[dict] | None = None) -> Path:
    return write_jsonl(path, documents() if rows is None else rows)


def results(index: Index, depth: int = 12) -> dict[str, list[list[tuple[str, float]]]]:
    """(id, score) of what every search finds for each query, and the scores of two judged documents."""
    judged = [np.array([0, len(index) - 1])] * len(QUERIES)

    def shown(found: Candidates) -> list[tuple[str, float]]:
        ids = [*map(index.documents.id, found.rows.tolist()), "judged", "judged"]
        return list(zip(ids, np.round([*found.scores, *found.judged_scores], 4).tolist(), strict=True))

    return {
        name: [shown(found) for found in search.search(QUERIES, judged, depth)]
        for name, search in index.searches.items()
    }


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}
