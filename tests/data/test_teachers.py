"""Several teachers as one: scales, missing scores, and stores that average."""

import json

import numpy as np
import pytest

from rag_retrieval.data.records import DataError, RecordRules
from rag_retrieval.data.store import open_store
from rag_retrieval.data.teachers import average_teachers

STARTS = np.array([0, 3])  # two queries, of three and two documents
FIRST = np.array([1.0, 0.0, -1.0, 2.0, 0.0])
SECOND = np.array([0.0, 3.0, 1.0, 0.0, 1.0])


def mean_entropy(scores):
    shares = [np.exp(part) / np.exp(part).sum() for part in (scores[:3], scores[3:])]
    return np.mean([-(share * np.log(share)).sum() for share in shares])


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_teachers_of_any_scale_have_an_equal_say(scale):
    averaged = average_teachers(np.stack([FIRST, scale * SECOND], axis=1), STARTS)
    of_second = 2 * averaged - FIRST
    assert mean_entropy(of_second) == pytest.approx(mean_entropy(FIRST), rel=1e-4)
    np.testing.assert_allclose(of_second / of_second[1], SECOND / SECOND[1], rtol=1e-4, atol=1e-5)


def test_a_missing_score_is_missing_in_the_mean_and_has_no_part_in_the_entropy():
    holes = np.stack([FIRST, SECOND], axis=1)
    holes[4, 1] = np.nan
    averaged = average_teachers(holes, STARTS)
    assert np.isnan(averaged).tolist() == [False, False, False, False, True]
    alone = average_teachers(holes[:3], STARTS[:1])
    np.testing.assert_array_equal(averaged[:3], alone)
    assert np.isnan(average_teachers(np.full((2, 2), np.nan), np.array([0]))).all()


def test_a_teacher_that_tells_nothing_apart_is_refused():
    with pytest.raises(ValueError, match="teacher 2"):
        average_teachers(np.array([[1.0, 5.0], [2.0, 5.0]]), np.array([0]))


def written(folder, records):
    path = folder / "data.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


RULES = RecordRules(teacher_key=("a", "b"), needs_teacher=True)


def test_a_store_of_several_teachers_has_their_average_in_groups(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RETRIEVAL_CACHE", str(tmp_path / "cache"))
    order = [3, 0, 4, 1, 2]  # the pairs of the two queries, mixed in the file
    pairs = [
        {"query": "qq"[: 1 + (place > 2)], "content": f"d{place}", "label": 0, "a": FIRST[place], "b": SECOND[place]}
        for place in order
    ]
    store = open_store(written(tmp_path, pairs), RULES, group_by_query=True)
    assert [store.pair(place).document for place in range(5)] == ["d3", "d4", "d0", "d1", "d2"]
    expected = average_teachers(np.stack([FIRST, SECOND], axis=1), STARTS)[[3, 4, 0, 1, 2]]
    np.testing.assert_allclose(store.teacher_scores, expected, rtol=1e-5)


def test_hits_have_the_score_of_each_teacher(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RETRIEVAL_CACHE", str(tmp_path / "cache"))
    hits = [{"content": f"d{i}", "label": 0, "a": FIRST[i], "b": 2 * FIRST[i]} for i in range(3)]
    store = open_store(written(tmp_path, [{"query": "q", "hits": hits}]), RULES)
    np.testing.assert_allclose(store.teacher_scores, FIRST[:3], atol=1e-5)


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ({"query": "q", "content": "d", "label": 0, "a": 1.0}, ["found no b"]),
        ({"query": "q", "pos": ["d"], "neg": ["e"], "pos_scores": [1.0], "neg_scores": [2.0]}, ["a, b", "hits"]),
        ({"query": "q", "hits": [{"content": "d", "label": 0, "a": i, "b": 1} for i in range(2)]}, ["teacher 2"]),
    ],
)
def test_what_is_missing_is_named_with_its_line(record, named, tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RETRIEVAL_CACHE", str(tmp_path / "cache"))
    with pytest.raises(DataError) as error:
        open_store(written(tmp_path, [record]), RULES)
    assert all(word in str(error.value) for word in ["data.jsonl", *named])
