"""How long the host takes to lay a batch out: `make_batch`, `Packing` and the bounds for a variable-length kernel.

    python benchmarks/layout.py [--tokens 65000]

Least and median milliseconds of 50 rounds, on random tokens, log-normal lengths of about 150 tokens, eight documents to
a query. In training all of it but `make_batch` runs in the main process, before every forward.
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import numpy as np

sys.path.append(str(Path(__file__).resolve().parents[1]))  # for a checkout that is not installed

ROUNDS, GROUP, QUERY_TOKENS = 50, 8, 14


def main(arguments: list[str] | None = None) -> None:
    import torch

    from rag_retrieval.models.packing import Packing
    from rag_retrieval.models.token_batch import make_batch

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=65_000)
    pairs = random_pairs(parser.parse_args(arguments).tokens)
    batch, cpu = make_batch(pairs), torch.device("cpu")
    print(f"{len(batch.ids):,} tokens in {len(batch)} pairs")
    print(f"make_batch                       {timed(lambda: make_batch(pairs))}")
    for causal, family in ((False, "encoder"), (True, "decoder, shared queries")):
        packing = timed(lambda causal=causal: Packing(batch, causal, cpu))
        bounds = timed(lambda causal=causal: Packing(batch, causal, cpu).kernel_bounds)
        print(f"Packing, {family:<24}{packing}\n  and its bounds                 {bounds}")


def random_pairs(tokens: int):
    from rag_retrieval.models.pair_encoding import EncodedPair

    draw = np.random.default_rng(0)
    pairs, total = [], 0
    while total < tokens:
        if len(pairs) % GROUP == 0:
            query = draw.integers(0, 30_000, QUERY_TOKENS, np.int32)
        length = int(np.clip(draw.lognormal(4.8, 0.6), 20, 512))
        document = draw.integers(0, 30_000, length - QUERY_TOKENS, np.int32)
        pairs.append(EncodedPair(np.concatenate((query, document)), np.zeros(length, np.int32), False, QUERY_TOKENS))
        total += length
    return pairs


def timed(work: Callable[[], object]) -> str:
    seconds = []
    for _ in range(ROUNDS):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return f"{1000 * min(seconds):.3f} ms, median {1000 * median(seconds):.3f} ms"


if __name__ == "__main__":
    main()
