"""`rag-retrieval quickstart`: train on the example data, measure on queries held out, show what changed.

The documents of a test query stand in the file in BM25's order, so the file's order is the BM25 row. Every row
ranks the same candidates.
"""

import json
import textwrap
import time
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

import numpy as np

from rag_retrieval.core.config import Config, OutputPath, key
from rag_retrieval.core.config_reader import load_config
from rag_retrieval.data.store import Group, open_store
from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.metrics import group_metrics, metric_value, rank_group
from rag_retrieval.models.cross_encoder import CrossEncoder
from rag_retrieval.train.reranker.config import RerankerConfig
from rag_retrieval.train.run_folder import CONFIGURATION_FILE
from rag_retrieval.train.script import TRAINERS, main_of

CONFIG = TRAINERS["reranker"].config_folder / "quickstart.yaml"
PACKAGE = Path(__file__).resolve().parent
IN_WHEEL, IN_CHECKOUT = PACKAGE / "example_data", PACKAGE.parent / "example_data"
EXAMPLES = IN_WHEEL if IN_WHEEL.is_dir() else IN_CHECKOUT
SHOWN = 3  # documents shown per ranking
WIDTH = 74  # columns of a document


class QuickstartConfig(Config):
    """One run on the example data."""

    main_keys: ClassVar = ("output_dir", "share", "seed")

    output_dir: OutputPath = key(
        "Folder for the run: new, empty, or with a run that was interrupted, which continues.", "runs/quickstart",
        min_length=1)
    share: float = key("Of the training questions that are used; half of them take 0.6 of the time.", 1.0, gt=0, le=1)
    seed: int = key("Of the training.", 42, ge=0, lt=2**32)


def run(config: QuickstartConfig) -> str | int:
    """What to print, or the exit code of a training that failed."""
    output_dir = Path(config.output_dir)
    model_folder = output_dir / "model"
    interrupted = (output_dir / CONFIGURATION_FILE).is_file() and not model_folder.exists()
    if not interrupted and output_dir.is_dir() and any(output_dir.iterdir()):
        raise ValueError(f"output_dir: {output_dir} is not empty; name another --output_dir, or remove it")
    started = time.monotonic()
    train_dataset = [{"path": str(EXAMPLES / "stdlib_grouped.train.jsonl"), "weight": config.share}]
    options = ["--train_dataset", json.dumps(train_dataset), "--seed", str(config.seed)]
    options += ["--resume", "auto"] if interrupted else []
    if code := main_of("reranker", ["--config", str(CONFIG), "--output_dir", str(output_dir), *options]):
        return code
    store = open_store(EXAMPLES / "stdlib_grouped.test.jsonl")
    groups = [store.group(index) for index in range(store.num_groups)]
    base = load_config(RerankerConfig, str(CONFIG), options).model_name_or_path
    rankings = {
        "BM25's order": [-np.arange(len(group.documents), dtype=float) for group in groups],
        "the base's embeddings, cosine": cosine_scores(base, groups),
        "the trained reranker": reranker_scores(model_folder, groups),
    }
    lines = [
        *table(rankings, groups),
        *examples(rankings["BM25's order"], rankings["the trained reranker"], groups),
        f"\nThe model: {model_folder} ({time.monotonic() - started:.0f} s in all). Use it:\n",
        "    from rag_retrieval import CrossEncoder",
        f'    reranker = CrossEncoder.from_pretrained("{model_folder}")',
        '    reranker.compute_score([["query", "document"], ...])',
    ]
    return "\n".join(lines)


def reranker_scores(folder: Path, groups: list[Group]) -> list[np.ndarray]:
    pairs = [(group.query, document) for group in groups for document in group.documents]
    scores = CrossEncoder.from_pretrained(str(folder)).compute_score(pairs, batch_size=32)
    return list(np.split(scores.numpy(), np.cumsum([len(group.documents) for group in groups])[:-1]))


def cosine_scores(base: str, groups: list[Group]) -> list[np.ndarray]:
    """Cosine of the vectors that the base, a sentence embedding model, gives untrained."""
    embedder = Embedder(base)
    queries = embedder.encode_queries([group.query for group in groups])
    documents = embedder.encode_documents([document for group in groups for document in group.documents])
    ends = np.cumsum([len(group.documents) for group in groups])[:-1]
    return [
        embedder.similarity(query, of_query)[0]
        for query, of_query in zip(queries, np.split(documents, ends), strict=True)
    ]


def table(rankings: dict[str, list[np.ndarray]], groups: list[Group]) -> Iterator[str]:
    labels = [group.labels for group in groups]
    yield f"\n{len(groups)} held-out queries, {sum(map(len, labels)):,} candidates, none of them seen in training:\n"
    yield f"  {'':<30} nDCG@10   MRR@10"
    for name, scores in rankings.items():
        values = group_metrics(scores, labels)
        yield f"  {name:<30} {values['ndcg@10']:>7.4f}  {values['mrr@10']:>7.4f}"


def examples(before: list[np.ndarray], after: list[np.ndarray], groups: list[Group]) -> Iterator[str]:
    """The two queries that gained most and the one that lost most, with the first documents of both orders."""
    old, new = (
        np.array([metric_value("ndcg@10", rank_group(values, group.labels)) for values, group in zip(scores, groups)])  # noqa: B905
        for scores in (before, after)
    )
    gains = new - old
    order = np.argsort(gains, kind="stable")
    for place in (order[-1], order[-2], order[0]):
        yield f"\nquery: {groups[place].query}   (nDCG@10 {gains[place]:+.2f})"
        for name, scores in (("BM25", before[place]), ("reranker", after[place])):
            yield f"  {name}, first {SHOWN}; * is the right one:"
            for document in np.argsort(-scores, kind="stable")[:SHOWN]:
                mark = "*" if groups[place].labels[document] > 0 else " "
                text = " ".join(groups[place].documents[document].split())
                yield f"    {mark} {textwrap.shorten(text, WIDTH, placeholder=' ...')}"
