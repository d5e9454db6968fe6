"""Micro-batches planned by tokens: a forward pass is bounded by the work in it, not by its rows.

The plan changes no result: losses are summed and divided once per optimizer step. What a reader would get
wrong: padded, a pair costs as many tokens as the longest of its part, so pairs of similar length must meet;
packed, it costs its own tokens, and sorting only keeps the parts even.
"""

from collections.abc import Sequence
from typing import NamedTuple


class PairSize(NamedTuple):
    """tokens: of the pair. shareable: of them, those before its document. beginning: a hash of these, equal for pairs
    that could share them."""

    tokens: int
    shareable: int
    beginning: int


def computed_tokens(sizes: Sequence[PairSize], *, padded: bool, shares_queries: bool) -> int:
    """Tokens that one forward of these pairs computes, padding included; equal beginnings stand side by side."""
    if padded:
        return len(sizes) * max(size.tokens for size in sizes)
    total = sum(size.tokens for size in sizes)
    if shares_queries:
        pairs = zip(sizes, sizes[1:], strict=False)
        total -= sum(size.shareable for before, size in pairs if before.beginning == size.beginning)
    return total


def plan_sharing(sizes: Sequence[PairSize], max_tokens: int, max_pairs: int) -> list[list[int]]:
    """Parts, as positions, in which pairs of equal beginning stand side by side and count it once in each part.

    A part holds at most `max_tokens` computed tokens and `max_pairs` pairs; a pair beyond the bound is a part of its
    own. Beginnings come in the order of their first pair.
    """
    first = {}
    for position, size in enumerate(sizes):
        first.setdefault(size.beginning, position)
    parts: list[list[int]] = []
    tokens = 0
    for position in sorted(range(len(sizes)), key=lambda position: first[sizes[position].beginning]):
        size = sizes[position]
        shared = bool(parts) and sizes[parts[-1][-1]].beginning == size.beginning
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
    else their sum) and `max_pairs` pairs; groups are never split, so a group beyond a bound is a part of its own.
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
        if not parts or _exceeds(cost, max_tokens) or _exceeds(pairs, max_pairs):
            parts.append([])
            pairs, tokens, longest = len(group), sum(group), max(group)
        parts[-1].append(position)
    return parts


def _exceeds(value: int, bound: int | None) -> bool:
    return bound is not None and value > bound
