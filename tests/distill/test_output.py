"""Scored records are training records again, to the last bit; the summary is what counting by hand gives."""

import json
import random

import numpy as np
import pytest
from record_samples import hits, pointwise, read, write

from rag_retrieval.distill.output import ScoreSummary, right_order, scored_line


def written(path, records) -> list[dict]:
    lines = []
    for place, record in enumerate(read(write(path, records))):
        lines.append(scored_line(record, [place + 0.5 - document for document in range(len(record.documents))]))
    return [json.loads(line) for line in lines]


def test_pointwise_records_keep_their_form(tmp_path):
    (line,) = written(tmp_path / "a.jsonl", pointwise(("q", "d", 1)))
    assert line == {"query": "q", "content": "d", "label": 1, "teacher_score": 0.5, "teacher_probability": 0.62245935}


def test_hits_get_a_score_each(tmp_path):
    (line,) = written(tmp_path / "a.jsonl", [hits("q", 2, 0)])
    assert list(line) == ["query", "hits"]
    assert [(hit["content"], hit["label"], hit["teacher_score"]) for hit in line["hits"]] == [
        ("q0", 2, 0.5),
        ("q1", 0, -0.5),
    ]


def test_positives_and_negatives_become_hits_with_their_labels(tmp_path):
    plain = {"query": "q", "pos": ["a", "b"], "neg": ["c"]}
    scored = plain | {"pos_scores": [0.9, 0.3], "neg_scores": [-1.5]}
    without, with_scores = written(tmp_path / "a.jsonl", [plain, scored])
    assert [hit["label"] for hit in without["hits"]] == [1, 1, 0]
    assert [hit["label"] for hit in with_scores["hits"]] == [0.9, 0.3, -1.5]
    assert [hit["content"] for hit in with_scores["hits"]] == ["a", "b", "c"]


def test_a_scored_file_reads_back_with_the_same_labels_and_scores(tmp_path):
    numbers = random.Random(1)
    records = [hits(f"查询 {i}", *(numbers.choice([0, 1, 0.3]) for _ in range(5))) for i in range(40)]
    scores = np.array([[numbers.gauss(0, 6) for _ in range(5)] for _ in range(40)], np.float32)
    before = read(write(tmp_path / "a.jsonl", records))
    lines = [scored_line(record, row.tolist()) for record, row in zip(before, scores, strict=True)]
    (tmp_path / "b.jsonl").write_text("".join(lines), encoding="utf-8")
    after = read(tmp_path / "b.jsonl")
    assert [(one.query, one.documents, one.labels) for one in after] == [
        (one.query, one.documents, one.labels) for one in before
    ]
    again = read(tmp_path / "b.jsonl", label_key="teacher_score")
    assert np.array_equal(np.array([one.labels for one in again], np.float32), scores)


@pytest.mark.parametrize("score, probability", [(0.0, 0.5), (-200.0, 0.0), (200.0, 1.0)])
def test_probabilities_stay_between_0_and_1(tmp_path, score, probability):
    (record,) = read(write(tmp_path / "a.jsonl", pointwise(("q", "d", 1))))
    assert json.loads(scored_line(record, [score]))["teacher_probability"] == pytest.approx(probability, abs=1e-37)


def summary_of(*records: list[tuple[float, float]]) -> ScoreSummary:
    summary = ScoreSummary()
    for record in records:
        summary.add({"label": label, "teacher_score": score} for label, score in record)
    return summary


def test_scores_are_summarized_by_label():
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


def test_many_levels_are_summarized_as_two_halves():
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
