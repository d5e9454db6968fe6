"""Float32 products of linear layers by MKL and by oneDNN, forward and backward, on one thread of this processor.

    python benchmarks/linear_products.py

`rag_retrieval.models.cpu_products` says where the package multiplies with oneDNN. Best of `--rounds`, both in turns.
"""

import argparse
import time
from contextlib import nullcontext

import torch
import torch.nn.functional as F
from speed_report import machine

from rag_retrieval.models.cpu_products import OneDnnProducts, onednn_is_faster

SHAPES = [(384, 384), (384, 1536), (1536, 384), (1024, 4096)]  # columns and outputs of layers
ROWS = (32, 256, 2048)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument("--rows", type=int, nargs="+", default=ROWS)
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    used = "is" if onednn_is_faster() else "is not"
    print(f"{machine('cpu')['processor']}, torch {torch.__version__}; oneDNN {used} used on this processor\n")
    print("| tokens | layer | MKL, GFLOP/s | oneDNN | with backward: MKL | oneDNN |\n|---|---|---|---|---|---|")
    for columns, outputs in SHAPES:
        for rows in options.rows:
            rates = [rate for backward in (False, True) for rate in rates_of(rows, columns, outputs, backward, options)]
            print(f"| {rows} | {columns} x {outputs} | {' | '.join(f'{rate:.0f}' for rate in rates)} |", flush=True)


def rates_of(rows: int, columns: int, outputs: int, backward: bool, options: argparse.Namespace) -> list[float]:
    """10^9 multiplications and additions a second, of MKL and of oneDNN."""
    sizes = ((rows, columns), (outputs, columns), (outputs,))
    inputs = [torch.randn(size, requires_grad=backward) for size in sizes]
    ways = (nullcontext, OneDnnProducts)
    best = [float("inf")] * len(ways)
    for number in range(options.rounds + 1):
        for place, way in enumerate(ways):
            start = time.perf_counter()
            with way():
                output = F.linear(*inputs)
                if backward:
                    torch.autograd.grad(output.sum(), inputs)
            if number:  # the first time memory is touched
                best[place] = min(best[place], time.perf_counter() - start)
    products = 3 if backward else 1
    return [2 * products * rows * columns * outputs / seconds / 1e9 for seconds in best]


if __name__ == "__main__":
    main()
