"""Micro-batches planned by tokens: a forward pass is bounded by the work in it, not by its rows.

The plan changes no result: losses are summed and divided once per optimizer step. What a reader would get
wrong: padded, a pair costs as many tokens as the longest of its part, so pairs of similar length must meet;
packed, it costs its own tokens, and sorting only keeps the parts even.
"""


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
