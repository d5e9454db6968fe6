"""How well a trained embedder retrieves, on any folder in BEIR layout: ours, or sentence-transformers' beside it.

    python benchmarks/quality_embedders.py --data DIR --trainer ours --out rows.jsonl
    python benchmarks/quality_embedders.py --table rows.jsonl

A row: train on `--queries` training queries with negatives from BM25's best documents, encode corpus and test queries,
search exactly, append the figures to `--out`. `--trainer base` measures the model that both start from. `--corpus N`
searches N documents instead of all: the relevant ones of the test queries, BM25's ten best for each, and others at
random; figures are then higher than on the whole corpus, and compare with each other alone. Every row is also read from
the first half, quarter and eighth of its vectors, and with documents in int8 and in bits. `--runtime` encodes with an
exported model.
"""

import argparse
import json
import os
import random
import shlex
import sys
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import quality
import yaml
from quality_tables import append_row, decimals, difference, per_query, read_rows, seconds

from rag_retrieval.data.beir import BeirFolder, Qrels, read_folder, read_pool, read_qrels
from rag_retrieval.data.collection import Collection
from rag_retrieval.evaluate.ranking_data import BM25, first_stage
from rag_retrieval.metrics import PerQuery, means, query_metrics
from rag_retrieval.models.vectors import finish, ranges_of, to_float32, to_precision

TRAINERS = ("base", "ours", "sentence-transformers")
RUNTIMES = ("torch", *(f"{name}{int8}" for name in ("onnx", "openvino") for int8 in ("", "-int8", "-static-int8")))
COLUMNS = ("ndcg@10", "mrr@10", "recall@10", "recall@100")
TESTED, DEPTH, DISTRACTORS = "ndcg@10", 100, 10
WARMUP, WEIGHT_DECAY, MAX_GRAD_NORM = 0.1, 0.01, 1.0
SAME = (  # what rows of one table have in common
    "queries", "depth", "epochs", "max_len", "lr", "temperature", "precision", "threads",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    options = parse(argument_parser(), arguments)
    if options.table:
        print(markdown_tables(read_rows(options.table)))
        return
    row = make_row(options) | {"command": options.command}
    append_row(options.out, row)
    print(markdown_tables([row]))


def parse(parser: argparse.ArgumentParser, arguments: list[str] | None) -> argparse.Namespace:
    """The options of a row, with the `command` that gave them, in a process that has not loaded torch yet."""
    options = parser.parse_args(arguments)
    if not options.table and (options.data is None or options.out is None):
        parser.error("a row needs --data and --out")
    # before torch is loaded: its worker threads read it once
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    options.command = shlex.join(["python", *(sys.argv if arguments is None else [parser.prog, *arguments])])
    return options


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder in BEIR layout")
    parser.add_argument("--model", default=quality.BASE, help="base: folder, hub name or package:NAME")
    parser.add_argument("--trainer", choices=TRAINERS, default="ours")
    parser.add_argument("--keys", nargs="*", default=[], metavar="KEY=VALUE", help="more of our trainer's YAML")
    parser.add_argument("--records", type=Path, help="training file to take instead of drawing one; for ours")
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
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="autocast in training, both sides")
    parser.add_argument("--encode-dtype", choices=("fp32", "bf16"), default="fp32", help="of the weights that encode")
    parser.add_argument("--runtime", choices=RUNTIMES, default="torch", help="what encodes, after an export")
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
            drawn = (options.queries, max(options.negatives, 1), options.depth, options.seed)
            data = options.records or draw_records(folder, drawn, options.negatives, work / "train.jsonl")
            train = train_ours if options.trainer == "ours" else train_sentence_transformers
            model, training = quality.timed(train, data, options, work)
        if options.runtime != "torch":
            model = export(model, options, work / "exported")
        vectors, searching = quality.timed(encode, model, collection, options)
    readings = {name: search(collection, *pair) for name, pair in readings_of(*vectors).items()}
    sizes = {"test_queries": len(collection.queries), "documents": len(collection.documents)}
    setting = {name: getattr(options, name) for name in SAME} | {"encoded in": options.encode_dtype}
    return {
        "setting": {"data": options.data.name} | sizes | setting,
        "trainer": trainer_name(options),
        "seed": options.seed,
        "figures": means(readings["whole"]),
        "per_query": {query: round(value, 6) for query, value in readings["whole"][TESTED].items()},
        "readings": {name: means(per_query)[TESTED] for name, per_query in readings.items()},
        "training": training,
        "searching": searching,
        "versions": {name: version(name) for name in quality.LIBRARIES},
        "cores": os.cpu_count(),
    }


def trainer_name(options: argparse.Namespace) -> str:
    """What trained, and how it differs from the plain training: a row of a table for each."""
    plain = argument_parser()
    levers = ("model", "runtime") if options.trainer == "base" else ("model", "negatives", "batch_size", "runtime")
    given = {name: getattr(options, name) for name in levers}
    changed = [f"{name}={value}" for name, value in given.items() if value != plain.get_default(name)]
    records = [options.records.name] if options.records else []
    return " ".join([options.trainer, *changed, *records, *options.keys])


def draw_records(folder: BeirFolder, drawn: tuple, negatives: int, path: Path) -> Path:
    """The training file. With no negatives the queries and positives of one."""
    records = quality.training_records(folder, *drawn)
    return quality.write_records([record | {"neg": record["neg"][:negatives]} for record in records], path)


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


def encode(model: str | Path, collection: Collection, options: argparse.Namespace) -> tuple[np.ndarray, np.ndarray]:
    """Vectors of all queries and of all documents, of length 1; both trainers' models are read by the same code."""
    from rag_retrieval import Embedder

    of_torch = {"max_length": options.max_len, "normalize": True, "dtype": options.encode_dtype}
    runtimes = {"torch": of_torch, "onnx": {}, "openvino": {"model_type": "openvino"}}
    embedder = Embedder(model, **runtimes[options.runtime.split("-")[0]])
    queries = embedder.encode_queries(list(collection.queries.values()))
    return queries, embedder.encode_documents(list(collection.documents.values()))


def export(model: str | Path, options: argparse.Namespace, folder: Path) -> Path:
    """The model as `rag-retrieval export` writes it; int8 whatever it costs, the row says what that is."""
    from rag_retrieval import ExportConfig, export_model

    int8 = {"quantize": "int8", "force": True} if "int8" in options.runtime else {}
    if "static" in options.runtime:
        int8["calibrate_with"] = str(options.data)
    export_model(ExportConfig(model=str(model), output=str(folder), max_length=options.max_len, normalize=True, **int8))
    return folder


def readings_of(queries: np.ndarray, documents: np.ndarray) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """The vectors whole; their first half, quarter and eighth; and with documents in int8 and in bits."""
    widths = [documents.shape[1] // share for share in (2, 4, 8)]
    ranges = ranges_of(documents, normalized=True)
    stored = {name: to_precision(documents, name, ranges) for name in ("int8", "binary")}
    return (
        {"whole": (queries, documents)}
        | {f"{width} wide": (finish(queries, width), finish(documents, width)) for width in widths}
        | {name: (queries, to_float32(vectors, ranges)) for name, vectors in stored.items()}
    )


def search(collection: Collection, queries: np.ndarray, documents: np.ndarray) -> PerQuery:
    from rag_retrieval.train.embedding.rankings import ranked

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
        "mixed_precision": options.precision,
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
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.sentence_transformer.losses import MultipleNegativesRankingLoss

    from rag_retrieval.models.settings import resolve_model_path

    model = SentenceTransformer(resolve_model_path(options.model), device="cpu")
    model.max_seq_length = options.max_len
    loss = MultipleNegativesRankingLoss(model, scale=1 / options.temperature)
    rows = their_rows(data, options.negatives)
    settings = SentenceTransformerTrainingArguments(**their_settings(options, model.prompts, rows[0], work))
    return run_theirs(SentenceTransformerTrainer, model, settings, rows, loss, work)


def their_rows(data: Path, negatives: int) -> list[dict[str, str]]:
    """The records with so many negatives, by column."""
    records = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    return [
        {"anchor": record["query"], "positive": record["pos"][0]}
        | {f"negative_{place}": text for place, text in enumerate(record["neg"])}
        for record in records
        if len(record["neg"]) == negatives
    ]


def their_settings(
    options: argparse.Namespace, prompts: dict[str, str | None], columns: Iterable[str], work: Path
) -> dict:
    """Training arguments of sentence-transformers that are ours."""
    texts = {column: "query" if column == "anchor" else "document" for column in columns}
    return {
        "output_dir": str(work / "trainer"),
        "num_train_epochs": options.epochs,
        "per_device_train_batch_size": options.batch_size,
        "learning_rate": options.lr,
        "weight_decay": WEIGHT_DECAY,
        "warmup_steps": WARMUP,  # below 1 it is a share
        "lr_scheduler_type": "cosine",
        "max_grad_norm": MAX_GRAD_NORM,
        "seed": options.seed,
        "bf16": options.precision == "bf16",
        "use_cpu": True,
        # as ours uses the model's prompts, which this trainer takes by column only
        "prompts": {column: prompts.get(prompt) or "" for column, prompt in texts.items()},
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
        "logging_steps": 10,
    }


def run_theirs(trainer: type, model, settings, rows: list[dict[str, str]], loss, work: Path) -> Path:
    from datasets import Dataset

    trainer(model=model, args=settings, train_dataset=Dataset.from_list(rows), loss=loss).train()
    model.save_pretrained(str(work / "model"), create_model_card=False)
    return work / "model"


# ---- tables


def markdown_tables(rows: list[dict], of_setting: Callable[[dict, dict], str] | None = None) -> str:
    """A table for each setting. Rows that differ in the seed alone become one; of a seed twice, the later.

    of_setting: makes one, as `markdown_table`, which is the default.
    """
    tables: dict[str, dict[str, dict[int, dict]]] = {}
    for row in rows:
        tables.setdefault(json.dumps(row["setting"]), {}).setdefault(row["trainer"], {})[row["seed"]] = row
    return "\n\n".join((of_setting or markdown_table)(json.loads(key), table) for key, table in tables.items())


def markdown_table(setting: dict, table: dict[str, dict[int, dict]]) -> str:
    """table: rows by trainer and seed. Differences are of the seeds that both have; the base has no seed."""
    rows = [row for seeds in table.values() for row in seeds.values()]
    readings = list(rows[0]["readings"])[1:]
    lines = [", ".join(f"{name} {value}" for name, value in setting.items()), ""]
    columns = [*COLUMNS, "training, s (CPU s)", "encoding, s (CPU s)", *(f"{TESTED}, {name}" for name in readings)]
    lines += [f"| trainer | seeds | {' | '.join(columns)} |", "|---" * (len(columns) + 2) + "|"]
    for trainer, seeds in table.items():
        figures = [decimals([row["figures"][name] for row in seeds.values()]) for name in COLUMNS]
        times = [seconds([row[name] for row in seeds.values()]) for name in ("training", "searching")]
        others = [decimals([row["readings"][name] for row in seeds.values()]) for name in readings]
        lines.append(f"| {' | '.join([trainer, str(len(seeds)), *figures, *times, *others])} |")
    lines.append("")
    for place, after in enumerate(table):
        for before in list(table)[:place]:
            lines += seeds_difference(before, after, table)
    libraries = dict.fromkeys(", ".join(f"{name} {v}" for name, v in row["versions"].items()) for row in rows)
    return "\n".join([*lines, *libraries, *dict.fromkeys(row["command"] for row in rows)])


def seeds_difference(before: str, after: str, table: dict[str, dict[int, dict]]) -> list[str]:
    """One line, or none where the two have no seed in common."""
    of_untrained = before.split()[0] == "base"
    seeds = sorted(table[after]) if of_untrained else sorted(table[before].keys() & table[after].keys())
    if not seeds:
        return []
    of_base = list(table[before].values())
    runs = [of_base if of_untrained else [table[before][seed] for seed in seeds], [table[after][s] for s in seeds]]
    return [difference(after, before, *map(per_query, runs), len(seeds))]


if __name__ == "__main__":
    main()
