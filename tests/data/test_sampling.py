import tracemalloc
from collections import Counter
from itertools import groupby

import numpy as np

from rag_retrieval.data import sampling
from rag_retrieval.data.sampling import (
    LONG_DOCUMENT,
    QUERY_RUN,
    REORDERINGS,
    epoch_order,
    pair_order,
    reorder_thirds,
    sample_group,
    sample_in_turns,
)


def group(positives: int, negatives: int) -> np.ndarray:
    """Positives spread among the negatives, not all in front."""
    flags = np.zeros(positives + negatives, dtype=bool)
    flags[np.linspace(0, len(flags) - 1, positives).astype(int)] = True
    assert flags.sum() == positives
    return flags


def draw(positive: np.ndarray, size: int, epoch: int, one_positive: bool, record: int = 3) -> np.ndarray:
    return sample_group(positive, size, epoch, seed=7, record=record, one_positive=one_positive)


def test_the_order_of_an_epoch_is_a_permutation():
    order = epoch_order(seed=1, epoch=0, records=1000)
    assert sorted(order) == list(range(1000)) and list(order) != list(range(1000))
    assert order.dtype == np.int32


def test_the_order_is_reproducible_and_differs_by_epoch_and_seed():
    first = epoch_order(1, 0, 100)
    assert (first == epoch_order(1, 0, 100)).all()
    assert (first != epoch_order(1, 1, 100)).any()
    assert (first != epoch_order(2, 0, 100)).any()


def test_turns_show_every_item_once_before_any_is_shown_again():
    items = np.arange(100, 107)
    turns = [sample_in_turns(items, 3, epoch, [0]) for epoch in range(3)]
    assert all(len(set(turn)) == 3 for turn in turns)
    assert set(np.concatenate(turns)) == set(items)
    assert max(Counter(np.concatenate(turns[:2])).values()) == 1


def test_a_new_shuffle_begins_when_all_items_were_shown():
    items = np.arange(50)
    assert list(sample_in_turns(items, 25, 0, [0])) != list(sample_in_turns(items, 25, 2, [0]))


def test_turns_give_all_items_where_there_are_no_more():
    items = np.arange(4)
    assert list(sample_in_turns(items, 4, 5, [0])) == list(sample_in_turns(items, 9, 5, [0])) == [0, 1, 2, 3]
    assert len(sample_in_turns(items[:0], 0, 0, [0])) == 0


def test_a_sampled_group_keeps_its_promises():
    for one_positive in [False, True]:
        for size in [2, 3, 5, 8]:
            for positives, negatives in [(1, 1), (1, 12), (3, 9), (5, 5), (9, 1), (6, 0), (0, 6)]:
                flags = group(positives, negatives)
                for epoch in range(20):
                    chosen = draw(flags, size, epoch, one_positive)
                    assert list(chosen) == sorted(set(chosen)), "ascending, nothing twice"
                    shown, hidden = int(flags[chosen].sum()), int((~flags[chosen]).sum())
                    if one_positive:
                        assert shown == min(1, positives)
                        assert hidden == min(size - shown, negatives)
                    else:
                        assert len(chosen) == min(size, len(flags))
                        assert shown >= min(1, positives) and hidden >= min(1, negatives)


def test_a_small_group_is_used_whole():
    assert list(draw(group(2, 3), 5, 0, one_positive=False)) == [0, 1, 2, 3, 4]
    assert list(draw(group(1, 3), 8, 0, one_positive=True)) == [0, 1, 2, 3]


def test_a_large_group_keeps_its_share_of_positives():
    assert group(4, 12)[draw(group(4, 12), 8, 0, one_positive=False)].sum() == 2  # 8 * 4 / 16
    assert group(30, 2)[draw(group(30, 2), 8, 0, one_positive=False)].sum() == 7  # 8 * 30 / 32, one negative stays


def test_all_negatives_are_seen_after_as_many_epochs_as_they_need():
    for one_positive in [False, True]:
        for negatives, size in [(12, 5), (13, 4), (7, 2), (20, 8)]:
            flags = group(1, negatives)
            epochs = -(-negatives // (size - 1))
            seen = np.concatenate([draw(flags, size, epoch, one_positive) for epoch in range(epochs)])
            assert set(seen) == set(range(negatives + 1))


def test_several_positives_take_turns():
    flags = group(4, 8)
    seen = np.concatenate([draw(flags, 4, epoch, one_positive=True) for epoch in range(4)])
    assert set(np.flatnonzero(flags)) <= set(seen)


def test_sampling_is_the_same_again_and_differs_by_epoch_and_record():
    flags = group(1, 30)
    first = draw(flags, 8, 0, one_positive=True)
    assert list(first) == list(draw(flags, 8, 0, one_positive=True))
    assert list(first) != list(draw(flags, 8, 1, one_positive=True))
    assert list(first) != list(draw(flags, 8, 0, one_positive=True, record=4))


LONG = "a" * 40 + "b" * 40 + "c" * 41


def test_thirds_change_places_and_no_character_is_lost():
    changed = {reorder_thirds(LONG, 1.0, seed=0, epoch=epoch, pair=0) for epoch in range(100)}
    parts = ("a" * 40, "b" * 40, "c" * 41)
    assert changed == {"".join(parts[place] for place in order) for order in REORDERINGS}
    assert LONG not in changed and len(REORDERINGS) == 5


def test_thirds_are_reordered_at_the_given_rate():
    changed = sum(reorder_thirds(LONG, 0.3, seed=0, epoch=0, pair=pair) != LONG for pair in range(2000))
    assert abs(changed / 2000 - 0.3) < 0.03  # three standard deviations


def test_thirds_differ_by_epoch_and_are_reproducible():
    def drawn(epoch: int) -> list[str]:
        return [reorder_thirds(LONG, 0.5, seed=0, epoch=epoch, pair=pair) for pair in range(50)]

    assert drawn(0) == drawn(0) and drawn(0) != drawn(1)


def test_short_documents_and_rate_zero_are_left_alone():
    assert reorder_thirds("x" * 50 + "y" * 50, 1.0, 0, 0, 0) == "x" * 50 + "y" * 50
    assert len("x" * 50 + "y" * 50) == LONG_DOCUMENT
    assert all(reorder_thirds(LONG, 0.0, 0, epoch, 0) == LONG for epoch in range(20))


def test_pairs_of_a_query_stay_together_in_shuffled_runs():
    sizes = np.array([4, 1, 20, 3])
    order = pair_order(3, 0, sizes)
    assert sorted(order) == list(range(28))
    query_of = np.repeat(np.arange(4), sizes)[order]
    runs = [len(list(run)) for _, run in groupby(query_of)]
    assert max(runs) <= 20 and len(runs) <= 6  # 20 pairs make runs of 8, 8 and 4; the others one each
    assert not np.array_equal(order, pair_order(3, 1, sizes))
    assert np.array_equal(order, pair_order(3, 0, sizes))


def plain_pair_order(seed: int, epoch: int, group_sizes: list[int]) -> list[int]:
    """What `pair_order` promises, pair by pair: a query's pairs by a random key each, cut into runs of 8, and
    the runs by a permutation that is drawn after all keys."""
    random = np.random.default_rng([seed, 0, epoch])
    keys = random.random(sum(group_sizes))
    runs, first = [], 0
    for size in group_sizes:
        pairs = sorted(range(first, first + size), key=lambda pair: keys[pair])
        runs += [pairs[start : start + 8] for start in range(0, size, 8)]
        first += size
    ranked = sorted(zip(random.permutation(len(runs)), runs, strict=True))
    return [pair for _, run in ranked for pair in run]


def test_the_pair_order_is_that_of_a_plain_implementation_whatever_the_chunk(monkeypatch):
    for chunk in [1, 3, 1000]:
        for sizes in [[1], [8], [9], [3, 17, 1, 8, 2, 16, 30], [1] * 20, [5] * 11]:
            monkeypatch.setattr(sampling, "CHUNK", chunk)
            order = pair_order(6, 2, np.array(sizes))
            assert order.tolist() == plain_pair_order(6, 2, sizes)
            assert order.dtype == np.int32


def test_the_pair_order_of_many_queries_takes_little_more_memory_than_itself():
    sizes = np.full(40_000, 5)
    tracemalloc.start()
    pair_order(0, 0, sizes)
    highest = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert highest < 200_000 * 24  # 8 bytes a pair, 21 a run of five pairs, and a chunk


def test_a_query_with_many_pairs_is_spread_over_the_epoch():
    query_of = np.repeat([0, 1], [400, 400])[pair_order(0, 0, np.array([400, 400]))]
    switches = np.flatnonzero(np.diff(query_of))
    assert len(switches) > 20, "100 runs of 8 in random order change query about 50 times"
    assert set(np.diff(switches) % QUERY_RUN) == {0}


def test_pairs_of_different_queries_are_just_shuffled():
    order = pair_order(0, 0, np.ones(1000, dtype=np.int64))
    assert sorted(order) == list(range(1000))
    assert abs(np.corrcoef(order, np.arange(1000))[0, 1]) < 0.1
