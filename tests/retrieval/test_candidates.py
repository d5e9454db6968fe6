import numpy as np

from rag_retrieval.retrieval.candidates import Candidates, best_rows


def test_the_best_rows_are_those_of_a_full_sort():
    for depth in [1, 3, 7, 50, 100]:
        scores = np.random.default_rng(depth).integers(0, 5, 60).astype(np.float32)
        by_hand = sorted((row for row in range(60) if scores[row] > 0), key=lambda row: (-scores[row], row))
        assert best_rows(scores, depth).tolist() == by_hand[:depth]


def test_nothing_scored_gives_nothing():
    assert best_rows(np.zeros(4, np.float32), 3).tolist() == []
    assert len(Candidates.none(2).rows) == 0 and Candidates.none(2).judged_scores.tolist() == [0, 0]
