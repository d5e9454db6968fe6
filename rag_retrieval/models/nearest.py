"""The nearest vectors of queries, exactly, in blocks: no matrix of all queries and all vectors exists."""

from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch

ASKED = 512  # queries that are compared at once
SEARCHED = 1 << 14  # with so many vectors
ROWS = 0xFFFFFFFF  # the lower half of a key


def as_float32(block: np.ndarray) -> np.ndarray:
    return block.astype(np.float32)


@torch.inference_mode()
def nearest(
    queries: np.ndarray,
    vectors: np.ndarray | Sequence[np.ndarray],
    depth: int,
    device: str | torch.device = "cpu",
    decode: Callable[[np.ndarray], np.ndarray] = as_float32,
    among: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(rows int64, inner products float32), both [queries, min(depth, vectors)], best first; of equal ones the lower
    row first.

    queries: float32 [queries, width]. vectors: [vectors, width] in memory or mapped from a file, or several such arrays
    whose rows count on. decode: a block of them to float32. among: int64, rising, the rows that count, None for all;
    no others are read. At most `ASKED` x `SEARCHED` products exist at once, on the
    device: some 300 MB. Raises ValueError for vectors and queries whose product is no finite number.
    """
    parts = [vectors] if isinstance(vectors, np.ndarray) else vectors
    depth = min(depth, sum(map(len, parts)) if among is None else len(among))
    starts = range(0, max(len(queries), 1), ASKED)
    asked = (queries[start : start + ASKED] for start in starts)
    best = torch.cat([_nearest(some, parts, depth, device, decode, among) for some in asked])
    return (ROWS - (best & ROWS)).numpy(), _scores(best).numpy()


def best_columns(scores: torch.Tensor, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """(columns int64, scores float32), both [rows, min(depth, columns)], best first; of equal ones the lower column
    first. scores: float32 [rows, columns]."""
    columns = torch.arange(scores.shape[1], device=scores.device)
    best = _keys(scores, columns).topk(min(depth, len(columns))).values.cpu()
    return (ROWS - (best & ROWS)).numpy(), _scores(best).numpy()


def _nearest(queries, parts, depth: int, device: str | torch.device, decode, among) -> torch.Tensor:
    """The keys of the best, falling: int64 [queries, depth], on the CPU."""
    queries = torch.from_numpy(queries).to(device)
    best = torch.empty((len(queries), 0), dtype=torch.int64, device=device)
    for rows, vectors in _blocks(parts, among):
        block = torch.from_numpy(decode(vectors)).to(device)
        scores = queries @ block.T
        if not scores.isfinite().all():
            place = f"{rows[0] + 1:,} to {rows[-1] + 1:,}"
            raise ValueError(f"a query and one of the vectors {place} have no finite product; encode both again")
        keys = _keys(scores, torch.from_numpy(rows).to(device))
        best = torch.cat([best, keys.topk(min(depth, len(block))).values], dim=1)
        best = best.topk(min(depth, best.shape[1])).values
    return best.cpu()


def _blocks(parts: Sequence[np.ndarray], among: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(rows, their vectors), at most `SEARCHED` at once."""
    first = 0
    for part in parts:
        end = first + len(part)
        own = None if among is None else among[slice(*np.searchsorted(among, (first, end)))]
        for start in range(0, len(part) if own is None else len(own), SEARCHED):
            if own is None:
                block = part[start : start + SEARCHED]
                yield np.arange(first + start, first + start + len(block)), block
            else:
                rows = own[start : start + SEARCHED]
                yield rows, part[rows - first]
        first = end


def _keys(scores: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """int64 numbers in the order of (score, -row), so that equal scores leave no choice: [queries, vectors].

    The upper half is the score's bits, turned so that they compare as the numbers do; the lower half the row.
    """
    bits = scores.contiguous().view(torch.int32).long()
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    return (bits << 32) | (ROWS - rows)


def _scores(keys: torch.Tensor) -> torch.Tensor:
    bits = keys >> 32
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).int().view(torch.float32)
