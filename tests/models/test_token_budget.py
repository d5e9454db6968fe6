import pytest

from rag_retrieval.models.token_budget import PairSize, computed_tokens, plan_by_tokens, plan_sharing


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

SIZES = [PairSize(10, 6, 1), PairSize(9, 5, 2), PairSize(8, 6, 1), PairSize(20, 6, 1), PairSize(7, 5, 2)]


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
