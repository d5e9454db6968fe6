"""Pairs packed into one row: which tokens are computed, at which positions, and what each may see.

The row is cut into segments. A segment is a pair, or, where consecutive pairs begin alike and a decoder reads
them, that common beginning (computed once) or the rest of a pair after it. The rest sees its own tokens and those
of its beginning, and its positions go on where the beginning ends: a tree of depth two.

What a reader would get wrong: sharing is exact for causal models alone. In a bidirectional encoder the query's
tokens look at the document, so they differ from document to document.
"""

from collections.abc import Iterator
from copy import copy
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
    """The layout of one batch for a causal model, which shares beginnings and is read at a pair's last token, or for a
    bidirectional one, which is read at its first.

    segments: of the row, in order. queries: (how many of its last tokens ask, which segment it is) for every segment
    that asks; all of them with all their tokens, but for `reading`. token_index: [tokens], int64, which of the
    batch's tokens stand in the row; None for all. positions: [tokens], int64, from 0 in each pair.
    """

    def __init__(self, batch: PairBatch, causal: bool):
        shared = batch.shared if causal else [0] * len(batch)
        self.segments: list[Segment] = []
        self._pair_segments: list[int] = []  # the segment in which each pair ends
        index, positions, read = [], [], []
        first_token = 0  # of the next pair, in the batch
        for run, beginning in _runs(shared):
            root = None
            if beginning:
                root = len(self.segments)
                self.segments.append(Segment(beginning))
                index += range(first_token, first_token + beginning)
                positions += range(beginning)
            for pair in run:
                length = batch.lengths[pair]
                read.append(len(index))
                index += range(first_token + beginning, first_token + length)
                positions += range(beginning, length)
                if causal:
                    read[-1] = len(index) - 1
                self._pair_segments.append(len(self.segments))
                self.segments.append(Segment(length - beginning, root))
                first_token += length
        self.device = batch.token_ids.device
        whole = len(index) == len(batch.token_ids)
        self.token_index = None if whole else on_device(index, self.device)
        self.positions = on_device(positions, self.device)
        self.queries = [(segment.length, place) for place, segment in enumerate(self.segments)]
        self._read = read

    @cached_property
    def read(self) -> torch.Tensor:
        """[pairs], int64: place in the row of the token whose state the head reads."""
        return on_device(self._read, self.device)

    @cached_property
    def reading(self) -> "Packing":
        """The same row, where nothing asks but the token of each pair that the head reads."""
        reading = copy(self)
        reading.__dict__.pop("kernel_bounds", None)
        reading.queries = [(1, place) for place in self._pair_segments]
        return reading

    @cached_property
    def lengths(self) -> list[int]:
        return [segment.length for segment in self.segments]

    @cached_property
    def kernel_bounds(self) -> KernelBounds:
        """What a kernel for variable lengths asks for: every segment's keys side by side, the shared ones repeated."""
        starts = [0, *accumulate(self.lengths)]
        key_index: list[int] = []
        key_lengths = []
        for _, place in self.queries:
            before = range(0)
            if (root := self.segments[place].begins_with) is not None:
                before = range(starts[root], starts[root + 1])
            own = range(starts[place], starts[place + 1])
            key_index += [*before, *own]
            key_lengths.append(len(before) + len(own))
        query_lengths = [asking for asking, _ in self.queries]
        plain = key_index == list(range(starts[-1]))
        return KernelBounds(
            on_device([0, *accumulate(query_lengths)], self.device).int(),
            on_device([0, *accumulate(key_lengths)], self.device).int(),
            max(query_lengths),
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
