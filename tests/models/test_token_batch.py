"""Token batches, their shared prefixes, and forwards planned by tokens, by hand."""

import numpy as np
import pytest

from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.token_batch import (
    TextSize,
    computed_tokens,
    make_batch,
    plan_by_tokens,
    plan_sharing,
    sizes_of,
)


def pair(ids: list[int], types: list[int] | None = None, document_start: int = 1) -> EncodedPair:
    return EncodedPair(
        np.array(ids, np.int32), None if types is None else np.array(types, np.int32), False, document_start
    )


def test_pairs_lie_one_after_another_with_their_lengths():
    batch = make_batch([pair([7, 8], [0, 1]), pair([4, 5, 6, 9], [0, 0, 1, 1])])
    assert batch.ids.tolist() == [7, 8, 4, 5, 6, 9]
    assert batch.types.tolist() == [0, 1, 0, 0, 1, 1]
    assert (batch.lengths.tolist(), len(batch)) == ([2, 4], 2)
    assert {values.dtype for values in (batch.ids, batch.types, batch.lengths, batch.shared)} == {np.dtype(np.int32)}
    assert make_batch([pair([7, 8])]).types is None


def test_a_pair_shares_what_stands_before_its_document_with_the_pair_before_it():
    pairs = [
        pair(ids, document_start=start)
        for ids, start in (([1, 2, 3], 2), ([1, 2, 4, 5], 2), ([1, 2, 3], 1), ([1, 9], 1), ([8, 9], 1), ([8], 0))
    ]
    # the third begins alike, but its query is shorter; the fifth begins with another token
    assert make_batch(pairs).shared.tolist() == [0, 2, 0, 1, 0, 0]


def test_shared_prefixes_are_those_of_a_plain_comparison():
    draw = np.random.default_rng(0)
    pairs = [pair(draw.integers(1, 3, 6).tolist(), document_start=int(draw.integers(0, 4))) for _ in range(2000)]
    expected = [0]
    for before, after in zip(pairs, pairs[1:], strict=False):
        start = after.document_start
        same = before.document_start == start and before.ids[:start].tolist() == after.ids[:start].tolist()
        expected.append(start if same else 0)
    assert make_batch(pairs).shared.tolist() == expected and max(expected) == 3


def test_an_empty_batch_fails_an_assertion():
    with pytest.raises(AssertionError):
        make_batch([])


def test_sizes_of_pairs_that_begin_alike_have_equal_prefixes():
    first, second, third = sizes_of([pair([1, 2, 3], None, 2), pair([1, 2, 9, 9], None, 2), pair([1, 3, 3], None, 2)])
    assert first[:2] == (3, 2) and second[:2] == (4, 2)
    assert first.prefix == second.prefix != third.prefix


# ---- plans -----------------------------------------------------------------------------------------------

def test_without_a_bound_the_batch_stays_one_part_in_its_order():
    assert plan_by_tokens([[3], [9], [5]], None) == [[0, 1, 2]]


def test_parts_hold_similar_lengths_and_no_more_than_the_bound_with_padding():
    # longest first: 10 alone would leave room for 0 more (2 x 10 > 16); 6 + 5 pad to 12; 3, 2, 1 pad to 9
    assert plan_by_tokens([[3], [10], [1], [5], [6], [2]], 16) == [[1], [4, 3], [0, 5, 2]]


def test_a_group_is_never_split_even_beyond_the_bound():
    assert plan_by_tokens([[2, 2], [9, 9, 9], [4, 1]], 16) == [[1], [2, 0]]


@pytest.mark.parametrize("bound", [1, 7, 30, 64, 1000])
def test_every_group_is_in_exactly_one_part(bound):
    lengths = [[(7 * place) % 23 + 1] * (place % 3 + 1) for place in range(40)]
    parts = plan_by_tokens(lengths, bound)
    assert sorted(position for part in parts for position in part) == list(range(40))
    for part in parts:
        pairs = [tokens for position in part for tokens in lengths[position]]
        assert len(part) == 1 or len(pairs) * max(pairs) <= bound


# ---- pairs that share their beginning ----------------------------------------------------------------------

SIZES = [TextSize(10, 6, 1), TextSize(9, 5, 2), TextSize(8, 6, 1), TextSize(20, 6, 1), TextSize(7, 5, 2)]


def test_computed_tokens_count_a_beginning_once_where_it_is_shared():
    side_by_side = [SIZES[0], SIZES[2], SIZES[1]]
    assert computed_tokens(side_by_side, padded=True, shares_queries=False) == 3 * 10
    assert computed_tokens(side_by_side, padded=False, shares_queries=False) == 10 + 8 + 9
    assert computed_tokens(side_by_side, padded=False, shares_queries=True) == 10 + 2 + 9


def test_pairs_of_a_query_are_planned_side_by_side_within_the_bound():
    # query 1: 10, 12 with the second, 26 > 25 with the third, which opens a part at its full 20
    assert plan_sharing(SIZES, max_tokens=25, max_pairs=10) == [[0, 2], [3], [1, 4]]
    assert plan_sharing(SIZES, max_tokens=26, max_pairs=10) == [[0, 2, 3], [1, 4]]
    assert plan_sharing(SIZES, max_tokens=100, max_pairs=2) == [[0, 2], [3, 1], [4]]
    assert plan_sharing(SIZES, max_tokens=1, max_pairs=2) == [[0], [2], [3], [1], [4]]


def test_a_part_of_shared_pairs_never_computes_more_than_its_bound():
    for bound in (12, 25, 26, 30, 60):
        for part in plan_sharing(SIZES, bound, max_pairs=10):
            tokens = computed_tokens([SIZES[place] for place in part], padded=False, shares_queries=True)
            assert tokens <= bound or len(part) == 1
