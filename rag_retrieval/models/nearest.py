"""The nearest vectors of queries, exactly, in blocks: no matrix of all queries and all vectors exists."""

from collections.abc import Callable, Sequence

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
) -> tuple[np.ndarray, np.ndarray]:
    """(rows int64, inner products float32), both [queries, min(depth, vectors)], best first; of equal ones the lower
    row first.

    queries: float32 [queries, width]. vectors: [vectors, width] in memory or mapped from a file, or several such arrays
    whose rows count on. decode: a block of them to float32. At most `ASKED` x `SEARCHED` products exist at once, on the
    device: some 300 MB. Raises ValueError for vectors and queries whose product is no finite number.
    """
    parts = [vectors] if isinstance(vectors, np.ndarray) else vectors
    depth = min(depth, sum(map(len, parts)))
    starts = range(0, max(len(queries), 1), ASKED)
    best = torch.cat([_nearest(queries[start : start + ASKED], parts, depth, device, decode) for start in starts])
    return (ROWS - (best & ROWS)).numpy(), _scores(best).numpy()


def best_columns(scores: torch.Tensor, depth: int) -> tuple[np.ndarray, np.ndarray]:
    """(columns int64, scores float32), both [rows, min(depth, columns)], best first; of equal ones the lower column
    first. scores: float32 [rows, columns]."""
    best = _keys(scores, 0).topk(min(depth, scores.shape[1])).values.cpu()
    return (ROWS - (best & ROWS)).numpy(), _scores(best).numpy()


def _nearest(queries, parts, depth: int, device: str | torch.device, decode) -> torch.Tensor:
    """The keys of the best, falling: int64 [queries, depth], on the CPU."""
    queries = torch.from_numpy(queries).to(device)
    best = torch.empty((len(queries), 0), dtype=torch.int64, device=device)
    first_row = 0
    for part in parts:
        for start in range(0, len(part), SEARCHED):
            block = torch.from_numpy(decode(part[start : start + SEARCHED])).to(device)
            scores = queries @ block.T
            if not scores.isfinite().all():
                rows = f"{first_row + 1:,} to {first_row + len(block):,}"
                raise ValueError(f"a query and one of the vectors {rows} have no finite product; encode both again")
            keys = _keys(scores, first_row)
            best = torch.cat([best, keys.topk(min(depth, len(block))).values], dim=1)
            best = best.topk(min(depth, best.shape[1])).values
            first_row += len(block)
    return best.cpu()


def _keys(scores: torch.Tensor, first_row: int) -> torch.Tensor:
    """int64 numbers in the order of (score, -row), so that equal scores leave no choice: [queries, vectors].

    The upper half is the score's bits, turned so that they compare as the numbers do; the lower half the row.
    """
    bits = scores.contiguous().view(torch.int32).long()
    bits = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    rows = torch.arange(first_row, first_row + scores.shape[1], device=scores.device)
    return (bits << 32) | (ROWS - rows)


def _scores(keys: torch.Tensor) -> torch.Tensor:
    bits = keys >> 32
    return torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits).int().view(torch.float32)
