"""The nearest vectors of queries, exactly, in blocks: no matrix of all queries and all vectors exists.

By numpy on the CPU, and by torch on other devices. Nothing here imports torch for the CPU.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rag_retrieval.models.arrays import on_device, on_host

if TYPE_CHECKING:
    import torch

    from rag_retrieval.models.arrays import Array

ASKED = 512  # queries that are compared at once
SEARCHED = 1 << 14  # with so many vectors
ROWS = 0xFFFFFFFF  # the lower half of a key
LEAST = np.iinfo(np.int64).min  # below every key


def as_float32(block: np.ndarray) -> np.ndarray:
    return block.astype(np.float32)


def nearest(
    queries: np.ndarray,
    vectors: np.ndarray | Sequence[np.ndarray],
    depth: int,
    device: "str | torch.device" = "cpu",
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
    best = [_nearest(queries[start : start + ASKED], parts, depth, device, decode) for start in starts]
    return _unpacked(np.concatenate(best))


def best_columns(scores: "torch.Tensor", depth: int) -> tuple[np.ndarray, np.ndarray]:
    """(columns int64, scores float32), both [rows, min(depth, columns)], best first; of equal ones the lower column
    first. scores: float32 [rows, columns]."""
    return _unpacked(on_host(_best_by_torch(None, scores, 0, min(depth, scores.shape[1]))))


def _nearest(queries, parts, depth: int, device, decode) -> np.ndarray:
    """The keys of the best, falling: int64 [queries, depth]."""
    queries, best, first_row = on_device(queries, device), None, 0
    for block in _blocks(parts):
        with np.errstate(invalid="ignore", over="ignore"):  # which is an error below
            scores = queries @ on_device(decode(block), device).T
        by_numpy = isinstance(scores, np.ndarray)
        if not (np.isfinite(scores) if by_numpy else scores.isfinite()).all():
            rows = f"{first_row + 1:,} to {first_row + len(block):,}"
            raise ValueError(f"a query and one of the vectors {rows} have no finite product; encode both again")
        best = (_best_by_numpy if by_numpy else _best_by_torch)(best, scores, first_row, depth)
        first_row += len(block)
    return np.empty((len(queries), 0), np.int64) if best is None else on_host(best)


def _blocks(parts: Sequence[np.ndarray]) -> Iterator[np.ndarray]:
    for part in parts:
        for start in range(0, len(part), SEARCHED):
            yield part[start : start + SEARCHED]


# ---- keys: int64 numbers in the order of (score, -row), so that equal scores leave no choice. The upper half is the
# ---- score's bits, turned so that they compare as the numbers do; the lower half the row.


def _keys(bits: "Array", rows: "Array") -> "Array":
    """bits: of float32 scores, as int64."""
    return (_turned(bits) << 32) | (ROWS - rows)


def _turned(bits: "Array") -> "Array":
    return bits ^ ((bits >> 63) & 0x7FFFFFFF)


def _unpacked(keys: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Rows and scores."""
    return ROWS - (keys & ROWS), _turned(keys >> 32).astype(np.int32).view(np.float32)


def _best_by_torch(best: "torch.Tensor | None", scores: "torch.Tensor", first_row: int, depth: int) -> "torch.Tensor":
    """The `depth` best of those so far and of a block: keys, falling. scores: [queries, rows of the block]."""
    import torch

    rows = torch.arange(first_row, first_row + scores.shape[1], device=scores.device)
    keys = _keys(scores.contiguous().view(torch.int32).long(), rows).topk(min(depth, scores.shape[1])).values
    keys = keys if best is None else torch.cat([best, keys], dim=1)
    return keys.topk(min(depth, keys.shape[1])).values


def _best_by_numpy(best: np.ndarray | None, scores: np.ndarray, first_row: int, depth: int) -> np.ndarray:
    """The same. Once there are `depth`, keys are made of those alone that are better than the last: few, while making
    and sorting all keys of a block takes as long as the products."""
    if best is None or best.shape[1] < depth:
        rows = np.arange(first_row, first_row + scores.shape[1])
        keys = _keys(scores.view(np.int32).astype(np.int64), rows)
        keys = keys if best is None else np.concatenate([best, keys], axis=1)
    else:
        queries, columns = np.nonzero(scores > _unpacked(best[:, -1:])[1])  # an equal one has a higher row
        counts = np.bincount(queries, minlength=len(scores))
        places = np.arange(len(queries)) - np.repeat(np.cumsum(counts) - counts, counts)
        more = np.full((len(scores), counts.max(initial=0)), LEAST)
        found = scores[queries, columns].view(np.int32).astype(np.int64)
        more[queries, places] = _keys(found, first_row + columns)
        keys = np.concatenate([best, more], axis=1)
    if keys.shape[1] > depth:
        keys = np.partition(keys, -depth, axis=1)[:, -depth:]
    return np.sort(keys, axis=1)[:, ::-1]
