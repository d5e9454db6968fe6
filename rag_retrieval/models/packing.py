"""Pairs packed into one row: which tokens are computed, at which positions, and what each may see.

The row is cut into segments. A segment is a pair, or, where consecutive pairs begin alike and a decoder reads
them, that common beginning (computed once) or the rest of a pair after it. The rest sees its own tokens and those
of its beginning, and its positions go on where the beginning ends: a tree of depth two.

What a reader would get wrong: sharing is exact for causal models alone. In a bidirectional encoder the query's
tokens look at the document, so they differ from document to document.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import NamedTuple

import torch

from rag_retrieval.models.pair_batch import PairBatch, on_device


@dataclass(frozen=True)
class Segment:
    """length: tokens. begins_with: index of the segment that holds the common beginning, or None."""

    length: int
    begins_with: int | None = None


class KernelBounds(NamedTuple):
    """queries, keys: [segments + 1], int32, where each segment's queries and keys begin. key_index: [keys], int64,
    which tokens of the row the keys are; None: all, in order."""

    queries: torch.Tensor
    keys: torch.Tensor
    longest_query: int
    longest_key: int
    key_index: torch.Tensor | None


class Packing:
    """The layout of one batch.

    token_index: [tokens], int64: which of the batch's tokens stand in the row. positions: [tokens], int64, from 0
    in each pair. ends: [pairs], int64: place of each pair's last token in the row. starts: the same for its first,
    which is common to pairs that share it. segments: of the row, in order.
    """

    def __init__(self, batch: PairBatch, share_beginnings: bool):
        shared = batch.shared if share_beginnings else [0] * len(batch)
        index, positions, starts, ends = [], [], [], []
        self.segments: list[Segment] = []
        row = first_token = 0  # tokens in the row so far; the next pair's place in the batch
        for run, beginning in _runs(shared):
            if beginning:
                index += range(first_token, first_token + beginning)
                positions += range(beginning)
                self.segments.append(Segment(beginning))
            run_start, root = row, len(self.segments) - 1 if beginning else None
            row += beginning
            for pair in run:
                length = batch.lengths[pair]
                index += range(first_token + beginning, first_token + length)
                positions += range(beginning, length)
                self.segments.append(Segment(length - beginning, root))
                starts.append(run_start if beginning else row)
                row += length - beginning
                ends.append(row - 1)
                first_token += length
        device = batch.token_ids.device
        whole = len(index) == len(batch.token_ids)
        self.token_index = None if whole else on_device(index, device)
        self.positions = on_device(positions, device)
        self._starts, self._ends, self.device = starts, ends, device

    @property
    def starts(self) -> torch.Tensor:
        return on_device(self._starts, self.device)

    @property
    def ends(self) -> torch.Tensor:
        return on_device(self._ends, self.device)

    @cached_property
    def lengths(self) -> list[int]:
        return [segment.length for segment in self.segments]

    @cached_property
    def kernel_bounds(self) -> KernelBounds:
        """What a kernel for variable lengths asks for: every segment's keys side by side, the shared ones repeated."""
        starts = [0, *accumulate(self.lengths)]
        key_index: list[int] = []
        key_lengths = []
        for start, segment in zip(starts, self.segments, strict=False):
            before = range(0)
            if segment.begins_with is not None:
                before = range(starts[segment.begins_with], starts[segment.begins_with + 1])
            key_index += [*before, *range(start, start + segment.length)]
            key_lengths.append(len(before) + segment.length)
        plain = len(key_index) == starts[-1]
        return KernelBounds(
            on_device(starts, self.device).int(),
            on_device([0, *accumulate(key_lengths)], self.device).int(),
            max(self.lengths),
            max(key_lengths),
            None if plain else on_device(key_index, self.device),
        )

    def select(self, tokens: torch.Tensor) -> torch.Tensor:
        """The row's tokens, [1, tokens], from the batch's."""
        return (tokens if self.token_index is None else tokens[self.token_index])[None]


def _runs(shared: list[int]) -> Iterator[tuple[range, int]]:
    """Consecutive pairs with the tokens of their common beginning; a pair that shares none is a run of its own."""
    start = 0
    while start < len(shared):
        stop = start + 1
        while stop < len(shared) and shared[stop] > 0:
            stop += 1
        yield range(start, stop), shared[start + 1] if stop > start + 1 else 0
        start = stop
