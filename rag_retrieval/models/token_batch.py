"""Token batches, as int32 arrays with the lengths of their texts, and how many texts share one forward.

A forward is bounded by the work in it, not by its rows. Padded, a text costs as many tokens as the longest of its
forward, so texts of similar length are put together; packed, it costs its own tokens, and sorting only keeps forwards
even. The plan changes no result: losses are summed and divided once per optimizer step.

How a batch is laid out, padded or packed, is decided in the model's forward and nowhere else. Nothing here imports
torch.
"""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import inf
from typing import NamedTuple

import numpy as np

from rag_retrieval.models.pair_encoding import EncodedPair

CPU_TOKENS = 2048  # of one forward: they stay in the CPU's caches and keep its cores busy
CUDA_TOKENS = 65_536  # of one forward, until one does not fit
LOGITS = 2**25  # of an output layer that are held at once, tokens times vocabulary


@dataclass(eq=False)
class TokenBatch:
    """At least one text (a pair is one, after its template). Arrays are int32 where nothing else is said.

    ids, types: [tokens], the texts one after another; types (segment ids) is None for families without them.
    lengths: [texts], tokens. shared: [texts], how many tokens at the beginning of a text, up to its document, are those
    of the text before it; 0 where they differ. starts: [texts], how many tokens stand before a text's document, those
    of a prompt say. is_query: [texts], bool, single texts that were encoded as queries. expansion: [texts], tokens at
    the end of a query that expand it.
    """

    ids: np.ndarray
    types: np.ndarray | None
    lengths: np.ndarray
    shared: np.ndarray
    starts: np.ndarray
    is_query: np.ndarray
    expansion: np.ndarray

    def __len__(self) -> int:
        return len(self.lengths)


def make_batch(pairs: Sequence[EncodedPair]) -> TokenBatch:
    assert pairs, "a batch holds at least one text"
    ids = np.concatenate([pair.ids for pair in pairs])
    types = None if pairs[0].types is None else np.concatenate([pair.types for pair in pairs])
    lengths = np.array([len(pair.ids) for pair in pairs], np.int32)
    starts = np.array([pair.document_start for pair in pairs], np.int32)
    shared = np.zeros_like(lengths)
    shared[1:] = np.where(starts[1:] == starts[:-1], starts[1:], 0)
    first = np.cumsum(lengths, dtype=np.int32) - lengths  # token of each text
    places = concatenated_ranges(first, shared)
    distances = np.repeat(first - np.roll(first, 1), shared)  # to the same token of the text before
    differences = np.concatenate(([0], np.cumsum(ids[places] != ids[places - distances])))
    ends = np.cumsum(shared)
    shared[differences[ends] != differences[ends - shared]] = 0
    is_query = np.array([pair.is_query for pair in pairs], bool)
    expansion = np.array([pair.expansion for pair in pairs], np.int32)
    return TokenBatch(ids, types, lengths, shared, starts, is_query, expansion)


def padded(batch: TokenBatch, pad_token_id: int, unattended: np.ndarray | None = None) -> dict[str, np.ndarray]:
    """Right-padded inputs of transformers, each [texts, longest]: input_ids, int32; attention_mask, bool; and, where
    the family has them, token_type_ids, int32. unattended: [texts], tokens at the end of each text that none attends
    to."""
    places = np.arange(batch.lengths.max())
    real = places < batch.lengths[:, None]
    ids = np.full(real.shape, pad_token_id, np.int32)
    ids[real] = batch.ids
    inputs = {"input_ids": ids, "attention_mask": real}
    if unattended is not None:
        inputs["attention_mask"] = places < (batch.lengths - unattended)[:, None]
    if batch.types is not None:
        inputs["token_type_ids"] = np.zeros(real.shape, np.int32)
        inputs["token_type_ids"][real] = batch.types
    return inputs


def texts_of(batch: TokenBatch, start: int, stop: int) -> TokenBatch:
    """The texts `start` to `stop` of a batch."""
    first, last = batch.lengths[:start].sum(), batch.lengths[:stop].sum()
    types = None if batch.types is None else batch.types[first:last]
    shared = batch.shared[start:stop].copy()
    shared[0] = 0
    rows = slice(start, stop)
    return TokenBatch(
        batch.ids[first:last],
        types,
        batch.lengths[rows],
        shared,
        batch.starts[rows],
        batch.is_query[rows],
        batch.expansion[rows],
    )


def concatenated_ranges(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """start, start + 1, ... of each range, one after another: [sum of lengths], int32."""
    ends = np.cumsum(lengths, dtype=np.int32)
    return np.arange(ends[-1], dtype=np.int32) + np.repeat(starts - (ends - lengths), lengths)


class TextSize(NamedTuple):
    """tokens: of the text. shareable: of them, those before its document. prefix: a checksum of these, equal for texts
    that can share them, in every process."""

    tokens: int
    shareable: int
    prefix: int


def sizes_of(pairs: Iterable[EncodedPair]) -> list[TextSize]:
    return [TextSize(len(pair), pair.document_start, zlib.crc32(pair.ids[: pair.document_start])) for pair in pairs]


def computed_tokens(sizes: Sequence[TextSize], *, padded: bool, shares_queries: bool) -> int:
    """Tokens that one forward of these pairs computes, padding included; equal beginnings stand side by side."""
    if padded:
        return len(sizes) * max(size.tokens for size in sizes)
    total = sum(size.tokens for size in sizes)
    if shares_queries:
        pairs = zip(sizes, sizes[1:], strict=False)
        total -= sum(size.shareable for before, size in pairs if before.prefix == size.prefix)
    return total


def plan_sharing(sizes: Sequence[TextSize], max_tokens: int, max_pairs: int) -> list[list[int]]:
    """Parts, as positions, in which pairs of equal beginning stand side by side and count it once in each part.

    A part holds at most `max_tokens` computed tokens and `max_pairs` pairs; a pair beyond the bound is a part by
    itself. Beginnings come in the order of their first pair.
    """
    first = {}
    for position, size in enumerate(sizes):
        first.setdefault(size.prefix, position)
    parts: list[list[int]] = []
    tokens = 0
    for position in sorted(range(len(sizes)), key=lambda position: first[sizes[position].prefix]):
        size = sizes[position]
        shared = bool(parts) and sizes[parts[-1][-1]].prefix == size.prefix
        more = size.tokens - (size.shareable if shared else 0)
        if not parts or tokens + more > max_tokens or len(parts[-1]) == max_pairs:
            parts.append([])
            tokens, more = 0, size.tokens
        parts[-1].append(position)
        tokens += more
    return parts


def plan_by_tokens(
    lengths: list[list[int]], max_tokens: int | None, *, padded: bool = True, max_pairs: int | None = None
) -> list[list[int]]:
    """Parts of a batch, as positions of its groups, longest groups first.

    lengths: for each group (one pair, for pointwise data) the tokens of its pairs; the tokens that count, where
    pairs share some. A part holds at most `max_tokens` tokens (with `padded`, its pairs times its longest pair;
    else their sum) and `max_pairs` pairs; groups are never split, so a group beyond a bound is a part by itself.
    Without any bound the whole batch is one part, in the order given.
    """
    if max_tokens is None and max_pairs is None:
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lambda position: -max(lengths[position]))
    parts: list[list[int]] = []
    pairs = tokens = longest = 0
    for position in order:
        group = lengths[position]
        pairs, tokens = pairs + len(group), tokens + sum(group)
        cost = pairs * longest if padded else tokens
        if not parts or cost > (max_tokens or inf) or pairs > (max_pairs or inf):
            parts.append([])
            pairs, tokens, longest = len(group), sum(group), max(group)
        parts[-1].append(position)
    return parts
