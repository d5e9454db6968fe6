"""The summary of a teacher's scores, against counting by hand."""

import random

import numpy as np
import pytest

from rag_retrieval.distill.score_summary import ScoreSummary, right_order


def summary_of(*records: list[tuple[float, float]]) -> ScoreSummary:
    summary = ScoreSummary()
    for record in records:
        summary.add({"label": label, "teacher_score": score} for label, score in record)
    return summary


def test_scores_are_told_by_label():
    summary = summary_of([(1, 4.0), (0, -2.0)], [(1, 2.0), (0, -4.0), (0, 3.0)])
    assert (summary.records, summary.pairs) == (2, 5)
    assert {name: scores.tolist() for name, scores in summary.by_label().items()} == {
        "label 0": [-2.0, -4.0, 3.0],
        "label 1": [4.0, 2.0],
    }
    lines = summary.describe().splitlines()
    assert lines[0] == "2 records, 5 pairs"
    assert lines[3].split()[:4] == ["label", "1", "2", "3.00"]
    # of 6 combinations only (2.0, 3.0) is in the wrong order
    assert lines[-1].endswith("the higher scores more in 83.3%")


def test_many_levels_are_told_in_two_halves():
    summary = summary_of([(place / 10, float(place)) for place in range(11)])
    assert {name: len(scores) for name, scores in summary.by_label().items()} == {
        "label up to 0.5": 6,
        "label above 0.5": 5,
    }


def test_one_level_alone_has_no_order():
    assert "higher" not in summary_of([(1, 2.0), (1, 3.0)]).describe()


def test_the_share_of_right_order_is_that_of_counting_every_pair():
    numbers = random.Random(2)
    groups = [np.array([numbers.randrange(6) for _ in range(size)], np.float32) for size in (7, 1, 12)]
    points = []
    for place, higher in enumerate(groups):
        for lower in groups[:place]:
            points += [1.0 if h > low else 0.5 if h == low else 0.0 for h in higher for low in lower]
    assert right_order(groups) == pytest.approx(sum(points) / len(points))
