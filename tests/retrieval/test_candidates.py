import numpy as np
import pytest

from rag_retrieval.retrieval.candidates import Candidates, best_rows, fuse


def listed(*rows):
    scores = np.linspace(1, 0.5, len(rows), dtype=np.float32)
    return Candidates(np.array(rows, np.int64), scores, np.zeros(1, np.float32))


def test_the_best_rows_are_those_of_a_full_sort():
    for depth in [1, 3, 7, 50, 100]:
        scores = np.random.default_rng(depth).integers(0, 5, 60).astype(np.float32)
        by_hand = sorted((row for row in range(60) if scores[row] > 0), key=lambda row: (-scores[row], row))
        assert best_rows(scores, depth).tolist() == by_hand[:depth]


def test_nothing_scored_gives_nothing():
    assert best_rows(np.zeros(4, np.float32), 3).tolist() == []
    assert len(Candidates.none(2).rows) == 0 and Candidates.none(2).judged_scores.tolist() == [0, 0]


def test_fusion_adds_reciprocal_ranks_by_hand():
    found = fuse([listed(7, 3, 5), listed(3, 9)], np.array([5, 4]), depth=10)
    # 3: 1/62 + 1/61; 7: 1/61; 9: 1/62; 5: 1/63
    assert found.rows.tolist() == [3, 7, 9, 5]
    assert found.scores.tolist() == pytest.approx([1 / 61 + 1 / 62, 1 / 61, 1 / 62, 1 / 63])
    assert found.judged_scores.tolist() == pytest.approx([1 / 63, 0])


def test_equal_ranks_are_fused_by_row_and_cut_at_the_depth():
    assert fuse([listed(8), listed(2)], np.array([0]), depth=10).rows.tolist() == [2, 8]
    assert fuse([listed(8, 1), listed(2)], np.array([0]), depth=2).rows.tolist() == [2, 8]
