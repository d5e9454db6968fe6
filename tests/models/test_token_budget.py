import pytest

from rag_retrieval.models.token_budget import plan_by_tokens


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
