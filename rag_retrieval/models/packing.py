"""The two layouts of a token batch: padded, a row for each text; or packed, all texts in one row without padding.

A packed row is made of segments. A segment is a text, or, where consecutive texts begin alike and a decoder reads them,
their shared prefix (computed once) or the rest of a text after it. The rest sees its own tokens and those of its
prefix, and its positions continue those of the prefix: a tree of depth two. Sharing is exact for causal models alone:
in a bidirectional encoder the query's tokens look at the document, so they differ from document to document.

Everything is computed on the host, in numpy; numbers read from the device would make the host wait for it.
"""

from copy import copy
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from rag_retrieval.models.token_batch import TokenBatch, concatenated_ranges, padded


def on_device(values: np.ndarray, device: torch.device, dtype: torch.dtype = torch.int64) -> torch.Tensor:
    """The same numbers as a tensor of that dtype, copied without waiting for the device."""
    tensor = torch.from_numpy(values)
    if device.type == "cuda":
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True).to(dtype)


def padded_inputs(
    batch: TokenBatch, pad_token_id: int, device: torch.device, unattended: np.ndarray | None = None
) -> dict[str, torch.Tensor]:
    """`token_batch.padded` as tensors, int64."""
    return {name: on_device(values, device) for name, values in padded(batch, pad_token_id, unattended).items()}


class KernelBounds(NamedTuple):
    """queries, keys: [segments + 1], int32, where each segment's queries and keys begin. key_index: [keys], int64,
    which tokens of the row the keys are; None: all, in order."""

    queries: torch.Tensor
    keys: torch.Tensor
    longest_query: int
    longest_key: int
    key_index: torch.Tensor | None


class AttentionRun(NamedTuple):
    """Segments of equal length, one after another. query_start, start: their first query and key in the row.
    query_length, length: tokens of each that attend, and that are attended to. prefix: the tokens of the shared prefix
    before them, for a run of one segment; None without one."""

    segments: int
    query_start: int
    query_length: int
    start: int
    length: int
    prefix: slice | None


class Packing:
    """The packed row of one batch: for a causal model, which may share prefixes, or for a bidirectional one.

    lengths: [segments], tokens; key_lengths: how many of them, the first, are attended to. prefix_segments: [segments],
    the segment of the shared prefix; -1 without one. query_lengths, query_segments: how many tokens attend, the last
    ones of which segment: all tokens of every segment, but for `pooled_layout`. token_index: [row], int64, which of the
    batch's tokens are in the row; None for all. positions: [row], int64, of each text from `first_position` on.
    pooled_index: [texts], int64, place in the row of the token whose state the head reads.
    """

    def __init__(
        self,
        batch: TokenBatch,
        shares_prefixes: bool,
        device: torch.device,
        first_position: int = 0,
        pooled_last: bool | None = None,
        pooled_alone: bool = True,
        unattended: np.ndarray | None = None,
    ):
        """first_position: where it is above 0, as in RoBERTa's family, first_position - 1 is the id of the padding
        token and its position: such a token inside a text is not counted. pooled_last: whether the head reads a text's
        last token, or its first; None: the last with shared prefixes. pooled_alone: whether no other token's state is
        read. unattended: [texts], tokens at the end of each text that none attends to; of a bidirectional model without
        sliding windows."""
        assert unattended is None or not shares_prefixes
        self.pooled_alone = pooled_alone
        shared = batch.shared if shares_prefixes else np.zeros_like(batch.shared)
        first_tokens = np.cumsum(batch.lengths, dtype=np.int32) - batch.lengths  # of each text, in the batch
        # a run is a text that shares nothing with the one before it, and those after it that do
        run_starts = np.flatnonzero(shared == 0)
        run_sizes = np.diff(run_starts, append=len(batch))
        run_prefixes = np.append(shared, np.int32(0))[run_starts + 1]  # 0 in a run of one text
        prefixes = np.repeat(run_prefixes, run_sizes)  # of each text
        sharing = run_prefixes > 0
        inserted = run_starts[sharing]  # texts before which the prefix of their run stands

        self.device = device
        self.lengths = np.insert(batch.lengths - prefixes, inserted, run_prefixes[sharing])
        self.key_lengths = self.lengths if unattended is None else self.lengths - unattended
        is_text = np.insert(np.ones(len(batch), bool), inserted, False)
        self._text_segments = np.flatnonzero(is_text)
        run_segments = np.full(len(run_starts), -1)
        run_segments[sharing] = np.flatnonzero(~is_text)
        self.prefix_segments = np.full(len(self.lengths), -1)
        self.prefix_segments[is_text] = np.repeat(run_segments, run_sizes)
        self.query_lengths, self.query_segments = self.lengths, np.arange(len(self.lengths))

        self.token_index = None
        if len(inserted):
            starts = np.insert(first_tokens + prefixes, inserted, first_tokens[inserted])
            self.token_index = on_device(concatenated_ranges(starts, self.lengths), device)
        first_positions = np.insert(prefixes, inserted, 0)
        positions = concatenated_ranges(first_positions, self.lengths) + np.int32(first_position)
        if first_position > 0 and (batch.ids == first_position - 1).any():
            positions = positions_without_padding(batch, first_position - 1)
        self.positions = on_device(positions, device)
        self._ends = np.cumsum(self.lengths, dtype=np.int32)
        last = shares_prefixes if pooled_last is None else pooled_last
        pooled = self._ends - 1 if last else self._ends - self.lengths
        self.pooled_index = on_device(pooled[self._text_segments], device)

    @cached_property
    def pooled_layout(self) -> "Packing":
        """The same row, where only the token of each text that the head reads attends."""
        layout = copy(self)
        for name in ("kernel_bounds", "attention_runs"):
            layout.__dict__.pop(name, None)
        layout.query_segments = self._text_segments
        layout.query_lengths = np.ones_like(self._text_segments)
        return layout

    @cached_property
    def attention_runs(self) -> list[AttentionRun]:
        """What attends in one call on a CPU: neighbours of equal length together, those with a prefix alone."""
        starts, runs, query_start = (self._ends - self.lengths).tolist(), [], 0
        lengths, prefixes = self.key_lengths.tolist(), self.prefix_segments.tolist()
        for place, query_length in zip(self.query_segments.tolist(), self.query_lengths.tolist(), strict=True):
            length, prefix = lengths[place], prefixes[place]
            last = runs[-1] if runs else None
            if prefix >= 0:
                shared = slice(starts[prefix], starts[prefix] + lengths[prefix])
                runs.append(AttentionRun(1, query_start, query_length, starts[place], length, shared))
            elif (
                last is not None
                and (last.prefix, last.query_length, last.length) == (None, query_length, length)
                and last.start + last.segments * length == starts[place]
            ):
                runs[-1] = last._replace(segments=last.segments + 1)
            else:
                runs.append(AttentionRun(1, query_start, query_length, starts[place], length, None))
            query_start += query_length
        return runs

    @cached_property
    def kernel_bounds(self) -> KernelBounds:
        """What a variable-length kernel takes: every segment's keys side by side, the shared ones repeated."""
        places = self.query_segments
        prefix_places = self.prefix_segments[places]
        # of each segment two ranges of keys: its prefix's, which may be empty, and its own
        ranges = np.stack((prefix_places, places), axis=1).ravel()
        lengths = np.where(ranges < 0, 0, self.key_lengths[ranges])
        key_lengths = lengths.reshape(-1, 2).sum(axis=1)
        key_index = None
        if key_lengths.sum() != self.lengths.sum() or (prefix_places >= 0).any():
            starts = self._ends[ranges] - self.lengths[ranges]
            key_index = on_device(concatenated_ranges(starts, lengths), self.device)
        bounds = (np.append(0, np.cumsum(counts)) for counts in (self.query_lengths, key_lengths))
        query_bounds, key_bounds = (on_device(values, self.device).int() for values in bounds)
        return KernelBounds(query_bounds, key_bounds, int(self.query_lengths.max()), int(key_lengths.max()), key_index)

    def select(self, values: np.ndarray) -> torch.Tensor:
        """[1, row], int64, from one value for each token of the batch."""
        tokens = on_device(values, self.device)
        return (tokens if self.token_index is None else tokens[self.token_index])[None]


def positions_without_padding(batch: TokenBatch, padding: int) -> np.ndarray:
    """As RoBERTa counts: padding + 1 is the position of a text's first token that is not padding, and `padding` that of
    all tokens that are. [tokens], int32."""
    real = (batch.ids != padding).astype(np.int32)
    counts = np.cumsum(real, dtype=np.int32)
    first_tokens = np.cumsum(batch.lengths) - batch.lengths
    counts -= np.repeat(counts[first_tokens] - real[first_tokens], batch.lengths)
    return counts * real + np.int32(padding)
