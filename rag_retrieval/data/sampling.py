"""What an epoch sees: the order of records, which documents of a group, which reordered texts.

Everything is a pure function of (seed, epoch, record): no state runs along, so a resumed run, another number
of workers or of processes draws exactly the same. "Epoch" is here the pass over a file, counted from 0: the run's epoch
where the file has weight 1.
"""

import numpy as np

ORDER, POSITIVES, NEGATIVES, THIRDS = range(4)  # one independent stream of random numbers for each purpose
# Pairs of one query that a pointwise epoch keeps together. MiniLM with BCE on 2,000 queries with one right
# and three wrong documents each stood at chance after 130 of 250 steps with pairs shuffled one by one (loss
# 0.562, chance 0.562), and at 0.298 after 110 steps with each query's pairs in one step: there they differ
# in the document alone.
QUERY_RUN = 8
CHUNK = 1 << 13  # groups or runs handled at once; the memory for a chunk does not depend on the data
LONG_DOCUMENT = 100  # characters; only longer documents have their thirds reordered
REORDERINGS = ((0, 2, 1), (1, 0, 2), (1, 2, 0), (2, 0, 1), (2, 1, 0))


def epoch_order(seed: int, epoch: int, records: int) -> np.ndarray:
    """A permutation of range(records): [records], int32 or int64. Only this grows with the data."""
    order = np.arange(records, dtype=np.int32 if records < 2**31 else np.int64)
    np.random.default_rng([seed, ORDER, epoch]).shuffle(order)
    return order


def pair_order(seed: int, epoch: int, group_sizes: np.ndarray) -> np.ndarray:
    """A permutation of all pairs in which pairs of one query stay together, in runs of at most QUERY_RUN.

    group_sizes: [queries], the pairs of each query, which stand side by side. Returns [pairs], int32 or int64.
    While it draws it takes 8 bytes for each pair and 21 for each run, of which 4 for each pair stay.
    """
    random = np.random.default_rng([seed, ORDER, epoch])
    shuffled = _shuffle_within_groups(random, group_sizes)
    starts, sizes = _runs(group_sizes, shuffled.dtype)
    by_rank = np.empty(len(starts), shuffled.dtype)
    by_rank[random.permutation(len(starts))] = np.arange(len(starts), dtype=shuffled.dtype)
    order, end = np.empty_like(shuffled), 0
    for first in range(0, len(by_rank), CHUNK):
        runs = by_rank[first : first + CHUNK]
        places = _stretches(starts[runs], sizes[runs])
        order[end : end + len(places)] = shuffled[places]
        end += len(places)
    return order


def _shuffle_within_groups(random: np.random.Generator, group_sizes: np.ndarray) -> np.ndarray:
    """The numbers of all pairs, group after group, shuffled inside each: [pairs], int32 or int64."""
    pairs = int(group_sizes.sum())
    shuffled = np.empty(pairs, np.int32 if pairs < 2**31 else np.int64)
    start = 0
    for first in range(0, len(group_sizes), CHUNK):
        sizes = group_sizes[first : first + CHUNK]
        stop = start + int(sizes.sum())
        group = np.repeat(np.arange(len(sizes)), sizes)
        # numbers drawn chunk by chunk are those that one call would draw
        shuffled[start:stop] = start + np.lexsort((random.random(stop - start), group))
        start = stop
    return shuffled


def _runs(group_sizes: np.ndarray, dtype: np.dtype) -> tuple[np.ndarray, np.ndarray]:
    """(first place, size) of each run of at most QUERY_RUN pairs: [runs] of dtype and uint8."""
    runs_of_group = -(-group_sizes // QUERY_RUN)
    sizes = np.full(runs_of_group.sum(), QUERY_RUN, np.uint8)
    sizes[np.cumsum(runs_of_group) - 1] = (group_sizes - 1) % QUERY_RUN + 1  # a group's last run has the rest
    starts = np.cumsum(sizes, dtype=dtype)
    starts -= sizes
    return starts, sizes


def _stretches(starts: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The numbers start .. start + size - 1 of each stretch, one stretch after the other, int64."""
    sizes = sizes.astype(np.int64)
    return np.repeat(starts - (np.cumsum(sizes) - sizes), sizes) + np.arange(sizes.sum())


def sample_in_turns(items: np.ndarray, count: int, epoch: int, key: list[int]) -> np.ndarray:
    """`count` of `items` without replacement, another window of a seeded shuffle in each epoch.

    After ceil(len(items) / count) epochs every item was drawn at least once; then there is a new shuffle.
    """
    if count >= len(items):
        return items
    windows = -(-len(items) // count)
    turn, window = divmod(epoch, windows)
    shuffled = np.random.default_rng([*key, turn]).permutation(items)
    # the last window is filled up from the front, which it does not overlap
    return np.roll(shuffled, -window * count)[:count]


def sample_group(positive: np.ndarray, size: int, epoch: int, seed: int, record: int, one_positive: bool) -> np.ndarray:
    """Positions of the documents that a group shows in this epoch, in ascending order.

    positive: [documents], bool. A group of at most `size` documents is used whole, unless `one_positive` asks
    for exactly one positive. A larger one keeps its share of positives, but always at least one positive and
    one negative where it has them.
    """
    positives, negatives = np.flatnonzero(positive), np.flatnonzero(~positive)
    if one_positive:
        wanted = min(1, len(positives))
    elif len(positive) <= size:
        return np.arange(len(positive))
    else:
        share = round(size * len(positives) / len(positive))
        most = size - 1 if len(negatives) else size
        wanted = min(max(share, size - len(negatives), 1), most, len(positives))
    chosen = [
        sample_in_turns(positives, wanted, epoch, [seed, POSITIVES, record]),
        sample_in_turns(negatives, size - wanted, epoch, [seed, NEGATIVES, record]),
    ]
    return np.sort(np.concatenate(chosen))


def reorder_thirds(text: str, probability: float, seed: int, epoch: int, pair: int) -> str:
    """With `probability`, a text longer than LONG_DOCUMENT characters with its thirds in another order."""
    if probability == 0 or len(text) <= LONG_DOCUMENT:
        return text
    random = np.random.default_rng([seed, THIRDS, epoch, pair])
    if random.random() >= probability:
        return text
    third = len(text) // 3
    parts = (text[:third], text[third : 2 * third], text[2 * third :])
    return "".join(parts[part] for part in REORDERINGS[random.integers(len(REORDERINGS))])
