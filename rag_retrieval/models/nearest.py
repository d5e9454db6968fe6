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
    among: np.ndarray | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """(rows int64, inner products float32), both [queries, min(depth, vectors)], best first; of equal ones the lower
    row first.

    queries: float32 [queries, width]. vectors: [vectors, width] in memory or mapped from a file, or several such arrays
    whose rows count on. decode: a block of them to float32. among: int64, rising, the rows that count, None for all; no
    others are read. At most `ASKED` x `SEARCHED` products exist at once, on the device: some 300 MB. Raises ValueError
    for vectors and queries whose product is no finite number.
    """
    parts = [vectors] if isinstance(vectors, np.ndarray) else vectors
    depth = min(depth, sum(map(len, parts)) if among is None else len(among))
    starts = range(0, max(len(queries), 1), ASKED)
    asked = (queries[start : start + ASKED] for start in starts)
    best = [_nearest(some, parts, depth, device, decode, among) for some in asked]
    return _unpacked(np.concatenate(best))


def best_columns(scores: "torch.Tensor", depth: int) -> tuple[np.ndarray, np.ndarray]:
    """(columns int64, scores float32), both [rows, min(depth, columns)], best first; of equal ones the lower column
    first. scores: float32 [rows, columns]."""
    return _unpacked(on_host(_best_by_torch(None, scores, np.arange(scores.shape[1]), depth)))


def _nearest(queries, parts, depth: int, device, decode, among) -> np.ndarray:
    """The keys of the best, falling: int64 [queries, depth]."""
    queries, best = on_device(queries, device), None
    for rows, vectors in _blocks(parts, among):
        with np.errstate(invalid="ignore", over="ignore"):  # which is an error below
            scores = queries @ on_device(decode(vectors), device).T
        by_numpy = isinstance(scores, np.ndarray)
        if not (np.isfinite(scores) if by_numpy else scores.isfinite()).all():
            place = f"{rows[0] + 1:,} to {rows[-1] + 1:,}"
            raise ValueError(f"a query and one of the vectors {place} have no finite product; encode both again")
        best = (_best_by_numpy if by_numpy else _best_by_torch)(best, scores, rows, depth)
    return np.empty((len(queries), 0), np.int64) if best is None else on_host(best)


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


def _best_by_torch(best: "torch.Tensor | None", scores: "torch.Tensor", rows: np.ndarray, depth: int) -> "torch.Tensor":
    """The `depth` best of those so far and of a block: keys, falling. scores: [queries, rows of the block]."""
    import torch

    keys = _keys(scores.contiguous().view(torch.int32).long(), torch.from_numpy(rows).to(scores.device))
    keys = keys.topk(min(depth, keys.shape[1])).values
    keys = keys if best is None else torch.cat([best, keys], dim=1)
    return keys.topk(min(depth, keys.shape[1])).values


def _best_by_numpy(best: np.ndarray | None, scores: np.ndarray, rows: np.ndarray, depth: int) -> np.ndarray:
    """The same. Once there are `depth`, keys are made of those alone that are better than the last: few, while making
    and sorting all keys of a block takes as long as the products."""
    if best is None or best.shape[1] < depth:
        keys = _keys(scores.view(np.int32).astype(np.int64), rows)
        keys = keys if best is None else np.concatenate([best, keys], axis=1)
    else:
        queries, columns = np.nonzero(scores > _unpacked(best[:, -1:])[1])  # an equal one has a higher row
        counts = np.bincount(queries, minlength=len(scores))
        places = np.arange(len(queries)) - np.repeat(np.cumsum(counts) - counts, counts)
        more = np.full((len(scores), counts.max(initial=0)), LEAST)
        found = scores[queries, columns].view(np.int32).astype(np.int64)
        more[queries, places] = _keys(found, rows[columns])
        keys = np.concatenate([best, more], axis=1)
    if keys.shape[1] > depth:
        keys = np.partition(keys, -depth, axis=1)[:, -depth:]
    return np.sort(keys, axis=1)[:, ::-1]
