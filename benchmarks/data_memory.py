"""Memory per process of the record store, for 10,000 and 1,000,000 pairs.

Makes pointwise files of short pairs in a temporary folder, builds their stores in a process of its own, then
lets two processes at once read all pairs in scattered order. Run: `python benchmarks/data_memory.py`.

RSS counts the mapped pages of the store, which all processes share and the system drops when memory
is short; it grows with the file. What a process has for itself is "private": RSS less file-backed pages.
"""

import argparse
import json
import multiprocessing
import platform
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import psutil
import pyarrow as pa

from rag_retrieval.data.store import RecordStore, open_store

MIB = 1 << 20
STRIDE = 7_368_787  # a prime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sizes", type=int, nargs="+", default=[10_000, 1_000_000], help="pairs per file")
    parser.add_argument("--pairs_per_query", type=int, default=10)
    arguments = parser.parse_args()
    print(f"Python {platform.python_version()}, numpy {np.__version__}, pyarrow {pa.__version__}")
    print("build: one process; read: each of two processes reading at once; memory in MiB above the imports")
    print(f"{'pairs':>10} {'order':>10} {'file MiB':>9} {'build s':>8} {'private':>8} ", end="")
    print(f"{'read/s':>9} {'private':>8} {'USS':>7} {'RSS':>7}")
    for size in arguments.sizes:
        for order in ("as is", "grouped", "scattered"):
            print_row(size, order, arguments.pairs_per_query)


def print_row(size: int, order: str, pairs_per_query: int) -> None:
    """One line of the table. order: "as is" has a group per record; the others group by query, with the pairs
    of a query next to each other in the file, or each in another place."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "pairs.jsonl"
        write_pairs(source, size, pairs_per_query, scattered=order == "scattered")
        with context.Pool(1) as pool:
            store, seconds, built = pool.apply(build, (source, order != "as is", Path(folder) / "cache"))
        with context.Manager() as manager, context.Pool(2) as pool:
            barrier = manager.Barrier(2)
            speed, private, uss, rss = pool.starmap(read_all, [(store, barrier, seed) for seed in (1, 2)])[0]
        megabytes = source.stat().st_size / MIB
    print(f"{size:>10,} {order:>10} {megabytes:>9.1f} {seconds:>8.1f} {built:>8.1f} ", end="")
    print(f"{speed:>9,.0f} {private:>8.1f} {uss:>7.1f} {rss:>7.1f}", flush=True)


def write_pairs(path: Path, size: int, pairs_per_query: int, scattered: bool) -> None:
    num_queries = max(1, size // pairs_per_query)
    with path.open("w") as file:
        for pair in range(size):
            query = pair % num_queries if scattered else pair // pairs_per_query
            record = {"query": f"what is thing {query}", "content": f"thing {query} is {pair}"}
            file.write(json.dumps(record | {"label": pair % 3}) + "\n")


def build(source: Path, group_by_query: bool, cache_dir: Path) -> tuple[RecordStore, float, float]:
    """(store, seconds, MiB): the highest private memory while building, above that of before."""
    before, start = private_memory(), time.perf_counter()
    with highest_memory(0.02) as highest:
        store = open_store(source, group_by_query=group_by_query, cache_dir=cache_dir)
    return store, time.perf_counter() - start, (highest[0] - before) / MIB


@contextmanager
def highest_memory(every: float) -> Iterator[list[int]]:
    """The highest private memory of the block so far, looked at every so many seconds, as the one item of a list."""
    highest, done = [private_memory()], threading.Event()

    def watch() -> None:
        while not done.wait(every):
            highest[0] = max(highest[0], private_memory())

    watcher = threading.Thread(target=watch)
    watcher.start()
    try:
        yield highest
    finally:
        done.set()
        watcher.join()


def read_all(store: RecordStore, barrier, seed: int) -> tuple[float, float, float, float]:
    """(pairs/s, private, USS, RSS in MiB above that of before), after reading every pair, jumping about."""
    process = psutil.Process()
    before, private = process.memory_full_info(), private_memory()
    barrier.wait()
    start, index = time.perf_counter(), seed
    for _ in range(store.num_pairs):
        # A stride without a common factor visits all: a shuffled list would itself cost memory for each pair.
        index = (index + STRIDE) % store.num_pairs
        store.pair(index)
    seconds = time.perf_counter() - start
    barrier.wait()  # both have the store mapped while they are measured
    after = process.memory_full_info()
    grown = (private_memory() - private, after.uss - before.uss, after.rss - before.rss)
    barrier.wait()
    return store.num_pairs / seconds, *(value / MIB for value in grown)


def private_memory(pid: int | None = None) -> int:
    """Bytes that are a process's own (default: this process's): resident, but backed by no file."""
    memory = psutil.Process(pid).memory_info()
    return memory.rss - memory.shared


if __name__ == "__main__":
    main()
