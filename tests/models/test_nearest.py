import numpy as np
import pytest

from rag_retrieval.models import nearest as module
from rag_retrieval.models.nearest import nearest


@pytest.mark.parametrize("block", [3, 7, 1 << 14])
@pytest.mark.parametrize("depth", [1, 4, 40, 100])
def test_the_nearest_are_those_of_a_full_sort(monkeypatch, block, depth):
    monkeypatch.setattr(module, "SEARCHED", block)
    monkeypatch.setattr(module, "ASKED", block)
    # whole numbers: sums are exact, and many scores are equal
    numbers = np.random.default_rng(0)
    vectors, queries = numbers.integers(-2, 3, (40, 5)).astype(np.float16), numbers.integers(-2, 3, (8, 5))
    rows, scores = nearest(queries.astype(np.float32), vectors, depth)
    for found, values, query in zip(rows, scores, queries, strict=True):
        products = vectors.astype(np.float32) @ query.astype(np.float32)
        expected = sorted(range(40), key=lambda row: (-products[row], row))[:depth]
        assert found.tolist() == expected
        assert values.tolist() == products[expected].tolist()


def test_scores_below_zero_are_in_order_and_keep_their_value():
    rows, scores = nearest(np.ones((1, 1), np.float32), np.array([[-1.5], [-0.25], [0.0], [-3.0], [2.0]]), 5)
    assert rows.tolist() == [[4, 2, 1, 0, 3]]
    assert scores.tolist() == [[2, 0, -0.25, -1.5, -3]]


@pytest.mark.parametrize("bad", [np.nan, -np.nan, np.inf])
def test_numbers_that_are_not_finite_are_refused_with_the_rows_they_are_among(monkeypatch, bad):
    monkeypatch.setattr(module, "SEARCHED", 3)
    vectors, queries = np.ones((8, 2), np.float32), np.ones((2, 2), np.float32)
    vectors[4, 1] = bad
    with pytest.raises(ValueError, match="one of the vectors 4 to 6 "):
        nearest(queries, vectors, 2)
    with pytest.raises(ValueError, match="one of the vectors 1 to 3 "):
        nearest(queries * bad, vectors[:4], 2)


def test_without_a_query_or_a_vector_nothing_is_found():
    assert nearest(np.empty((0, 3), np.float32), np.ones((4, 3)), 2)[0].shape == (0, 2)
    assert nearest(np.ones((2, 3), np.float32), np.empty((0, 3)), 2)[0].shape == (2, 0)
