"""Memory, CPU time and recall of search by vectors, exact and by FAISS, in up to 2,000,000 documents.

The vectors are made for the purpose and nothing is encoded: float16 of width 384 and length 1, each near one of many
centres, since vectors without any structure have no neighbours to find. A shard has 50,000 of them and is made, as the
index makes its own, by `run_shards`. Each row is a process of its own. Run:
`python benchmarks/index_scale.py --work FOLDER`.

Private memory is RSS less file-backed pages: the system drops mapped pages of vectors when memory is short.
"""

import argparse
import multiprocessing
import platform
import time
from pathlib import Path

import faiss
import numpy as np
import torch
from data_memory import MIB, highest_memory

from rag_retrieval.core.shard_folder import MakeShard, ShardWork
from rag_retrieval.core.shards import run_shards
from rag_retrieval.retrieval.approximate import build_faiss
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.searches import open_dense
from rag_retrieval.retrieval.vector_shards import open_vectors

WIDTH = 384
NEAR = 0.8  # cosine of a vector and its centre, about
PER_CENTRE = 200  # vectors
SHARD, SEED = 50_000, 7
QUERIES, DEPTH = 100, 100
EXACT = "exact"
COLUMNS = {"vectors": 10, "search": 14, "built s": 8, "MiB": 7, "one ms": 8, "many ms": 8, "recall": 7, "private": 8}
HEAD = " ".join(f"{name:>{width}}" for name, width in COLUMNS.items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, required=True, help="folder for vectors and indexes; 2 GB for 2,000,000")
    parser.add_argument("--sizes", type=int, nargs="+", default=[500_000, 2_000_000], help="vectors")
    parser.add_argument("--searches", nargs="+", default=[EXACT, "IVF1024,PQ48"], help="exact, or FAISS's names")
    parser.add_argument("--rescore_factor", type=int, default=4, help="vectors scored anew for each one asked for")
    options = parser.parse_args()
    print(f"Python {platform.python_version()}, numpy {np.__version__}, torch {torch.__version__}, ", end="")
    print(f"faiss {faiss.__version__}, {torch.get_num_threads()} thread(s); memory in MiB, highest")
    print(f"CPU time; one, many: of a query alone, and of one among {QUERIES} at once; {DEPTH} documents each")
    print(HEAD)
    for size in options.sizes:
        for search in options.searches:
            with multiprocessing.get_context("spawn").Pool(1) as pool:
                print(pool.apply(measure, (options.work / str(size), size, search, options.rescore_factor)), flush=True)


def measure(folder: Path, size: int, search: str, rescore_factor: int = 4) -> str:
    """A line of the table. Vectors and index are made where they are not there."""
    approximate = {} if search == EXACT else {"faiss_index": search, "rescore_factor": rescore_factor}
    options = IndexOptions(embedder="no-model", bm25=False, device="cpu", **approximate)
    paths = {"vectors": folder / "vectors"}
    with highest_memory(0.05) as highest:
        make_vectors(paths["vectors"], size)
        start = time.process_time()
        if options.faiss_index:
            paths["faiss"] = folder / "faiss" / search.replace(",", "-")
            if not (paths["faiss"] / "index").exists():
                paths["faiss"].mkdir(parents=True)
                build_faiss(*open_vectors(paths, options), options, paths["faiss"])
        built = time.process_time() - start
        searcher = open_dense(paths, options, None, "cpu")
        queries = queries_of(searcher.vectors)
        one, many = (seconds_of(searcher, queries, at_once) * 1000 for at_once in (1, QUERIES))
        recall = 1.0 if options.faiss_index is None else searcher.recall(0)
    stored = sum(file.stat().st_size for file in paths[list(paths)[-1]].rglob("*") if file.is_file())
    numbers = f"{built:>8.1f} {stored / MIB:>7.0f} {one:>8.3f} {many:>8.3f} {recall:>7.3f} {highest[0] / MIB:>8.0f}"
    return f"{size:>10,} {search:>14} {numbers}"


def make_vectors(folder: Path, size: int) -> None:
    sizes = [min(SHARD, size - start) for start in range(0, size, SHARD)]
    work = ShardWork("index_scale:open_made", {"sizes": sizes, "centres": max(1, size // PER_CENTRE)})
    run_shards(folder, {"vectors": "made", "near": NEAR}, sizes, work, description="making", unit="vectors")


def open_made(sizes: list[int], centres: int) -> MakeShard:
    """Vectors around centres that are the same for all shards."""
    places = np.random.default_rng(SEED).standard_normal((centres, WIDTH), np.float32)

    def make(number: int, folder: Path) -> None:
        generator = np.random.default_rng([SEED, number])
        drawn = places[generator.integers(centres, size=sizes[number])]
        noise = generator.standard_normal((sizes[number], WIDTH), np.float32) * np.sqrt(1 / NEAR**2 - 1)
        vectors = drawn + noise.astype(np.float32)
        vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
        np.save(folder / "vectors.npy", vectors.astype(np.float16))

    return make


def queries_of(vectors) -> np.ndarray:
    """Documents with some noise, of length 1: float32 [QUERIES, WIDTH]."""
    generator = np.random.default_rng(1)
    rows = np.sort(generator.permutation(len(vectors))[:QUERIES])
    noise = generator.standard_normal((len(rows), WIDTH), np.float32)
    queries = vectors.rows(rows) + 0.5 * noise / np.sqrt(WIDTH)
    return (queries / np.linalg.norm(queries, axis=1, keepdims=True)).astype(np.float32)


def seconds_of(searcher, queries: np.ndarray, at_once: int) -> float:
    """CPU seconds of a query. Alone only a tenth of them are asked: exact search reads everything for each."""
    asked = queries if at_once > 1 else queries[: max(1, len(queries) // 10)]
    judged = [np.zeros(0, np.int64)] * at_once
    start = time.process_time()
    for place in range(0, len(asked), at_once):
        searcher.search_vectors(asked[place : place + at_once], judged[: len(asked) - place], DEPTH)
    return (time.process_time() - start) / len(asked)


if __name__ == "__main__":
    main()
