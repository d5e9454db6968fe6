"""How well a trained embedder retrieves, on any folder in BEIR layout: ours, or sentence-transformers' beside it.

    python benchmarks/quality_embedders.py --data DIR --trainer ours --out rows.jsonl
    python benchmarks/quality_embedders.py --table rows.jsonl

A row: train on `--queries` training queries with negatives from BM25's best documents, encode corpus and test queries,
search exactly, append the figures to `--out`. `--trainer base` measures the model that both start from. `--corpus N`
searches N documents instead of all: the relevant ones of the test queries, BM25's ten best for each, and others at
random; figures are then higher than on the whole corpus, and compare with each other alone.
"""

import argparse
import json
import os
import random
import shlex
import sys
from importlib.metadata import version
from pathlib import Path

import quality
import yaml
from quality_tables import read_rows

from rag_retrieval.data.beir import BeirFolder, Qrels, read_folder, read_pool, read_qrels
from rag_retrieval.data.collection import Collection
from rag_retrieval.evaluate.output import comparison_cells
from rag_retrieval.evaluate.ranking_data import BM25, first_stage
from rag_retrieval.metrics import PerQuery, means, query_metrics
from rag_retrieval.significance import compare

TRAINERS = ("base", "ours", "sentence-transformers")
COLUMNS = ("ndcg@10", "mrr@10", "recall@10", "recall@100")
TESTED, DEPTH, DISTRACTORS = "ndcg@10", 100, 10
WARMUP, WEIGHT_DECAY, MAX_GRAD_NORM = 0.1, 0.01, 1.0
SAME = (  # what rows of one table have in common
    "model", "queries", "negatives", "depth", "epochs", "batch_size", "max_len", "lr", "temperature", "threads",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser()
    options = parser.parse_args(arguments)
    if options.table:
        print(markdown_tables(read_rows(options.table)))
        return
    if options.data is None or options.out is None:
        parser.error("a row needs --data and --out")
    # before torch is loaded: its worker threads read it once
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    row = make_row(options)
    row["command"] = shlex.join(["python", *(sys.argv if arguments is None else ["quality_embedders.py", *arguments])])
    with open(options.out, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(markdown_tables([row]))


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder in BEIR layout")
    parser.add_argument("--model", default=quality.BASE, help="base: folder, hub name or package:NAME")
    parser.add_argument("--trainer", choices=TRAINERS, default="ours")
    parser.add_argument("--keys", nargs="*", default=[], metavar="KEY=VALUE", help="more of our trainer's YAML")
    parser.add_argument("--queries", type=int, default=1024, help="training queries")
    parser.add_argument("--negatives", type=int, default=1, help="of each, from BM25")
    parser.add_argument("--depth", type=int, default=20, help="BM25's documents to draw negatives from")
    parser.add_argument("--test-queries", default="all", help="a number, or all")
    parser.add_argument("--corpus", type=int, help="documents to search instead of all")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--batch_size", type=int, default=32, help="queries of a step")
    parser.add_argument("--max_len", type=int, default=128, help="tokens of a text, in training and test")
    parser.add_argument("--lr", type=float, default=5e-5)
    parser.add_argument("--temperature", type=float, default=0.05)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, help="empty folder to keep records and model in")
    parser.add_argument("--out", type=Path, help="file to append the row to")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a file's rows as Markdown")
    return parser


def make_row(options: argparse.Namespace) -> dict:
    import torch

    torch.set_num_threads(options.threads)
    folder = read_folder(options.data)
    collection = test_collection(folder, options.test_queries, options.corpus)
    with quality.work_folder(options.work) as work:
        model, training = options.model, {"seconds": 0.0, "cpu_seconds": 0.0}
        if options.trainer != "base":
            drawn = (options.queries, options.negatives, options.depth, options.seed)
            data = quality.write_records(quality.training_records(folder, *drawn), work / "train.jsonl")
            train = train_ours if options.trainer == "ours" else train_sentence_transformers
            model, training = quality.timed(train, data, options, work)
        per_query, searching = quality.timed(retrieve, model, collection, options.max_len)
    sizes = {"test_queries": len(collection.queries), "documents": len(collection.documents)}
    return {
        "setting": {"data": options.data.name} | sizes | {name: getattr(options, name) for name in SAME},
        "trainer": " ".join([options.trainer, *options.keys]),
        "seed": options.seed,
        "figures": means(per_query),
        "per_query": {query: round(value, 6) for query, value in per_query[TESTED].items()},
        "training": training,
        "searching": searching,
        "versions": {name: version(name) for name in quality.LIBRARIES},
        "cores": os.cpu_count(),
    }


def test_collection(folder: BeirFolder, test_queries: str, size: int | None) -> Collection:
    """The test queries against the whole corpus, or against `size` documents: the same for every seed and trainer."""
    qrels = quality.choose_queries(read_qrels(folder, "test"), test_queries)
    pool = read_pool(folder, "test")
    kept = sorted(folder.documents if size is None else some_documents(folder, qrels, size), key=str.encode)
    queries = {query: folder.queries[query] for query in qrels}
    documents = {document: folder.documents[document] for document in kept}
    return Collection(str(folder.path), queries, documents, qrels, pool=pool)


def some_documents(folder: BeirFolder, qrels: Qrels, size: int) -> set[str]:
    relevant = {document for grades in qrels.values() for document, grade in grades.items() if grade > 0}
    best = first_stage(folder, "test", list(qrels), None, BM25, DISTRACTORS).run
    kept = (relevant | {document for documents in best.values() for document in documents}) & folder.documents.keys()
    others = sorted(folder.documents.keys() - kept)
    return kept | set(random.Random(0).sample(others, max(0, min(size - len(kept), len(others)))))


def retrieve(model: str | Path, collection: Collection, max_len: int) -> PerQuery:
    """Of all queries, by the cosine of vectors; both trainers' models are read by the same code."""
    from rag_retrieval import Embedder
    from rag_retrieval.train.embedding.validation import ranked

    embedder = Embedder(model, max_length=max_len, normalize=True)
    queries = embedder.encode_queries(list(collection.queries.values()))
    documents = embedder.encode_documents(list(collection.documents.values()))
    return query_metrics(collection.qrels, ranked(collection, queries, documents, DEPTH), COLUMNS)


# ---- the two trainers


def train_ours(data: Path, options: argparse.Namespace, work: Path) -> Path:
    """Run the real command on a YAML file. Returns the model's folder; RuntimeError when it fails."""
    from rag_retrieval.train.embedding.train_embedding import main as train

    os.environ["RAG_RETRIEVAL_CACHE"] = str(work / "cache")
    config = {
        "task": "embedding",
        "model_name_or_path": options.model,
        "train_dataset": str(data),
        "train_group_size": options.negatives + 1,
        "query_max_len": options.max_len,
        "passage_max_len": options.max_len,
        "loss_type": "info_nce",
        "temperature": options.temperature,
        "output_dir": str(work / "out"),
        "epochs": options.epochs,
        "batch_size": options.batch_size,
        "lr": options.lr,
        "weight_decay": WEIGHT_DECAY,
        "warmup_proportion": WARMUP,
        "max_grad_norm": MAX_GRAD_NORM,
        "seed": options.seed,
        "num_workers": 0,  # as the other side, which tokenizes between two steps too
        "save_on_epoch_end": False,  # the final model is written anyway
    }
    config |= {key: yaml.safe_load(value) for key, value in (pair.split("=", 1) for pair in options.keys)}
    (work / "training.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    if code := train(["--config", str(work / "training.yaml")]):
        raise RuntimeError(f"training ended with exit code {code}; its message is above")
    return work / "out" / "model"


def train_sentence_transformers(data: Path, options: argparse.Namespace, work: Path) -> Path:
    """SentenceTransformerTrainer with MultipleNegativesRankingLoss. Returns the model's folder."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from rag_retrieval.models.settings import resolve_model_path

    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    rows = [
        {"anchor": record["query"], "positive": record["pos"][0]}
        | {f"negative_{place}": text for place, text in enumerate(record["neg"])}
        for record in records
        if len(record["neg"]) == options.negatives
    ]
    model = SentenceTransformer(resolve_model_path(options.model), device="cpu")
    model.max_seq_length = options.max_len
    settings = SentenceTransformerTrainingArguments(
        output_dir=str(work / "trainer"),
        num_train_epochs=options.epochs,
        per_device_train_batch_size=options.batch_size,
        learning_rate=options.lr,
        weight_decay=WEIGHT_DECAY,
        warmup_steps=WARMUP,  # below 1 it is a share
        lr_scheduler_type="cosine",
        max_grad_norm=MAX_GRAD_NORM,
        seed=options.seed,
        use_cpu=True,
        dataloader_pin_memory=False,
        save_strategy="no",
        report_to="none",
        logging_steps=10,
    )
    loss = MultipleNegativesRankingLoss(model, scale=1 / options.temperature)
    SentenceTransformerTrainer(model=model, args=settings, train_dataset=Dataset.from_list(rows), loss=loss).train()
    model.save_pretrained(str(work / "model"), create_model_card=False)
    return work / "model"


# ---- tables


def markdown_tables(rows: list[dict]) -> str:
    """A table for each setting, of a trainer and seed twice the later row, and the differences of all to the first."""
    tables: dict[str, dict[tuple[str, int], dict]] = {}
    for row in rows:
        tables.setdefault(json.dumps(row["setting"]), {})[row["trainer"], row["seed"]] = row
    return "\n\n".join(markdown_table(json.loads(key), list(table.values())) for key, table in tables.items())


def markdown_table(setting: dict, rows: list[dict]) -> str:
    lines = [", ".join(f"{name} {value}" for name, value in setting.items()), ""]
    lines += [f"| trainer | seed | {' | '.join(COLUMNS)} | training, s (CPU s) | encoding and search, s (CPU s) |"]
    lines += ["|---" * (len(COLUMNS) + 4) + "|"]
    for row in rows:
        figures = [f"{row['figures'][name]:.4f}" for name in COLUMNS]
        times = [f"{row[name]['seconds']:.0f} ({row[name]['cpu_seconds']:.0f})" for name in ("training", "searching")]
        lines.append(f"| {' | '.join([row['trainer'], str(row['seed']), *figures, *times])} |")
    lines.append("")
    for place, after in enumerate(rows):
        for before in rows[:place]:
            runs = {TESTED: before["per_query"]}, {TESTED: after["per_query"]}
            gain, interval, p_value, *counts = comparison_cells(compare(*runs, "randomization", seed=0)[0])
            names = " - ".join(f"{row['trainer']} (seed {row['seed']})" for row in (after, before))
            lines.append(f"{names}: {TESTED} {gain}, {interval}, p {p_value}, {'/'.join(counts)} gained/lost/same")
    libraries = dict.fromkeys(", ".join(f"{name} {v}" for name, v in row["versions"].items()) for row in rows)
    return "\n".join([*lines, *libraries, *dict.fromkeys(row["command"] for row in rows)])


if __name__ == "__main__":
    main()
