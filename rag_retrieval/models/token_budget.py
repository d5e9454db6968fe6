"""Micro-batches planned by tokens: pairs of similar length together, so that little padding is computed.

The plan changes no result: losses are summed and divided once per optimizer step. It cuts a batch into more
forward passes, which costs nothing on a CPU (1,024 tokens keep its cores busy) and bounds memory on a GPU.
"""


def plan_by_tokens(lengths: list[list[int]], max_tokens: int | None) -> list[list[int]]:
    """Parts of a batch, as positions of its groups, longest groups first.

    lengths: for each group (one pair, for pointwise data) the tokens of its pairs. A part holds at most
    `max_tokens` tokens, padding included (its pairs times its longest pair); groups are never split, so a group
    beyond the bound is a part of its own. None: the whole batch is one part, in the order given.
    """
    if max_tokens is None:
        return [list(range(len(lengths)))]
    order = sorted(range(len(lengths)), key=lambda position: -max(lengths[position]))
    parts: list[list[int]] = []
    pairs = longest = 0
    for position in order:
        pairs += len(lengths[position])
        if not parts or pairs * longest > max_tokens:
            parts.append([])
            pairs, longest = len(lengths[position]), max(lengths[position])
        parts[-1].append(position)
    return parts
