"""Fusion by hand arithmetic."""

import json

import numpy as np
import pytest

from rag_retrieval.infer.results import EMPTY_SCORE
from rag_retrieval.retrieval.candidates import Candidates
from rag_retrieval.retrieval.fusion import FusedSearch, Fusion, combine, spread


def listed(*rows, scores=None):
    scores = np.linspace(1, 0.5, len(rows)) if scores is None else scores
    return Candidates(np.array(rows, np.int64), np.array(scores, np.float32), np.zeros(1, np.float32))


def fuse(first, second, judged=(0,), depth=10, weights=None):
    return Fusion(weights).fuse({"bm25": first, "dense": second}, np.array(judged), depth)


def test_fusion_adds_reciprocal_ranks_by_hand():
    found = fuse(listed(7, 3, 5), listed(3, 9), judged=[5, 4])
    # 3: 1/62 + 1/61; 7: 1/61; 9: 1/62; 5: 1/63
    assert found.rows.tolist() == [3, 7, 9, 5]
    assert found.scores.tolist() == pytest.approx([1 / 61 + 1 / 62, 1 / 61, 1 / 62, 1 / 63])
    assert found.judged_scores.tolist() == pytest.approx([1 / 63, 0])


def test_equal_ranks_are_fused_by_row_and_cut_at_the_depth():
    assert fuse(listed(8), listed(2)).rows.tolist() == [2, 8]
    assert fuse(listed(8, 1), listed(2), depth=2).rows.tolist() == [2, 8]


def test_fusion_adds_weighted_scores_by_hand():
    bm25, dense = listed(7, 3, 5, scores=[12, 9, 6]), listed(3, 9, scores=[0.5, -0.5])
    found = fuse(bm25, dense, judged=[9, 3, 4], weights={"bm25": 0.25, "dense": 0.75})
    # of bm25 7: 1, 3: 0.5, 5: 0; of dense 3: 1, 9: 0
    assert found.rows.tolist() == [3, 7, 5, 9]
    assert found.scores.tolist() == [0.125 + 0.75, 0.25, 0, 0]
    assert found.judged_scores.tolist() == [0, 0.875, 0]


def test_a_list_of_equal_scores_is_at_the_top_and_an_empty_one_is_nothing():
    assert spread(np.array([3, 3], np.float32)).tolist() == [1, 1]
    found = fuse(listed(4, 2, scores=[3, 3]), listed(), weights={"bm25": 0.5, "dense": 0.5})
    assert found.rows.tolist() == [2, 4] and found.scores.tolist() == [0.5, 0.5]
    assert len(fuse(listed(), listed()).rows) == 0
    rows = np.random.default_rng(0).permutation(900).tolist()
    many = listed(*rows, scores=[3] * 300 + [2] * 300 + [1] * 300)
    found = fuse(many, listed(), depth=600, weights={"bm25": 1, "dense": 1})
    assert found.rows.tolist() == sorted(rows[:300]) + sorted(rows[300:600])


class Recorded:
    words = "english 3"

    def __init__(self, candidates):
        self.candidates, self.asked = candidates, []

    def search(self, queries, judged, depth):
        self.asked.append(depth)
        return [self.candidates for _ in queries]


def test_a_stage_of_weight_0_is_not_searched_and_finds_nothing():
    bm25, dense = Recorded(listed(1, 2)), Recorded(listed(3))
    search = FusedSearch({"bm25": bm25, "dense": dense}, Fusion({"bm25": 0, "dense": 1}))
    (found,) = search.search(["a"], [np.array([1])], 5)
    assert found.rows.tolist() == [3] and found.judged_scores.tolist() == [0]
    assert (bm25.asked, dense.asked) == ([], [5])


def test_every_search_goes_to_the_full_depth_and_queries_keep_their_order():
    bm25, dense = Recorded(listed(1, 2)), Recorded(listed(2, 3))
    found = FusedSearch({"bm25": bm25, "dense": dense}, Fusion()).search(["a", "b"], [np.array([1])] * 2, 2)
    assert [one.rows.tolist() for one in found] == [[2, 1], [2, 1]]
    assert bm25.asked == dense.asked == [2]


@pytest.mark.parametrize("weights", [{"bm25": 0, "dense": 0}, {"bm25": -1, "dense": 2}, {"a": "1"}, {"a": 1.1}])
def test_weights_that_mean_nothing_are_refused(weights):
    with pytest.raises(ValueError, match="weights: .*found"):
        Fusion(weights)


def test_weights_of_other_stages_are_refused():
    for weights in ({"bm25": 1.0}, {"bm25": 0.2, "dense": 0.3, "lexical": 0.5}):
        with pytest.raises(ValueError, match="weights are of bm25.*searched are bm25, dense"):
            fuse(listed(1), listed(2), weights=weights)
    assert fuse(listed(1), listed(2), weights={"bm25": 0.2, "dense": 0.3, "lexical": 0}).rows.tolist() == [2, 1]


def test_a_file_of_weights_is_read_and_any_other_refused(tmp_path):
    file = tmp_path / "fusion.json"
    for weights in (None, {"bm25": 0.3, "dense": 0.7}):
        file.write_text(json.dumps({"weights": weights}))
        assert Fusion.read(file) == Fusion(weights)
        Fusion(weights, 0.65, "digest").save(file, {"split": "dev"})
        assert Fusion.read(file) == Fusion(weights, 0.65, "digest")
        assert json.loads(file.read_text())["fitted"] == {"split": "dev"}
    for text in ("", "{}", '{"weights": [1]}', '{"weights": {"bm25": -1}}', '{"weights": null, "reranker_weight": 2}'):
        file.write_text(text)
        with pytest.raises(ValueError, match="fusion.json: expected a file that rag-retrieval fit-fusion wrote"):
            Fusion.read(file)


def test_a_reranker_and_what_it_read_are_combined_by_hand():
    scores = np.array([0.9, 0.7, 0.5, 99, 0.6], np.float32)  # spread: 1, 0.5, 0, none, 0.25
    logits = np.array([-2, 6, 2, EMPTY_SCORE, 0], np.float32)  # spread: 0, 1, 0.5, none, 0.25
    expected = [0.25, 0.875, 0.375, EMPTY_SCORE, 0.25]
    assert combine(0.75, scores, logits).tolist() == pytest.approx(expected)
    assert combine(0, scores, logits).tolist() == pytest.approx([1, 0.5, 0, EMPTY_SCORE, 0.25])
    assert combine(1, scores, logits).tolist() == pytest.approx([0, 1, 0.5, EMPTY_SCORE, 0.25])
    assert combine(0.5, scores[:0], logits[:0]).tolist() == []


@pytest.mark.parametrize("weight", [-0.1, 1.5, "0.5", float("nan")])
def test_a_weight_of_a_reranker_that_means_nothing_is_refused(weight):
    with pytest.raises(ValueError, match="reranker_weight: .*found"):
        Fusion(None, weight)
