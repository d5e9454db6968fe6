"""Ranking metrics by hand, with ties, and against ir_measures on data without ties."""

import math

import ir_measures
import numpy as np
import pytest
from ir_measures import AP, RR, nDCG

from rag_retrieval.metrics import average_precision, ndcg, rank_metrics, reciprocal_rank


def random_groups(seed: int, count: int = 40) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Groups of 1 to 30 documents, no tied scores, labels -1 to 3; each has a relevant document."""
    rng = np.random.default_rng(seed)
    scores, labels = [], []
    for size in rng.integers(1, 31, size=count):
        scores.append(rng.permutation(size) + rng.uniform(0, 0.5))
        graded = rng.choice([-1, 0, 0, 0, 1, 2, 3], size=size)
        graded[rng.integers(size)] = 2
        labels.append(graded)
    return scores, labels


@pytest.mark.parametrize("relevant_from", [1, 2])
@pytest.mark.parametrize("k", [1, 10, 100])
def test_metrics_agree_with_ir_measures_where_no_scores_are_tied(relevant_from, k):
    scores, labels = random_groups(seed=relevant_from * 1000 + k)
    run = {f"q{q}": {f"d{d}": float(s) for d, s in enumerate(group)} for q, group in enumerate(scores)}
    qrels = {f"q{q}": {f"d{d}": int(y) for d, y in enumerate(group)} for q, group in enumerate(labels)}
    measures = {nDCG @ k: f"ndcg@{k}", RR(rel=relevant_from) @ k: f"mrr@{k}", AP(rel=relevant_from): "map"}
    expected = ir_measures.calc_aggregate(list(measures), qrels, run)
    found = rank_metrics(scores, labels, relevant_from=relevant_from, k=k)
    for measure, key in measures.items():
        assert found[key] == pytest.approx(expected[measure], abs=1e-9), key


def test_metrics_of_one_query_by_hand():
    # Labels by rank: 0, 2, 1, 0.
    scores, labels = [1.0, 4.0, 2.0, 3.0], [0, 0, 1, 2]
    dcg = 2 / math.log2(3) + 1 / math.log2(4)
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    assert ndcg(scores, labels) == pytest.approx(dcg / ideal, rel=1e-12)
    assert reciprocal_rank(scores, labels) == 1 / 2
    assert average_precision(scores, labels) == pytest.approx((1 / 2 + 2 / 3) / 2, rel=1e-12)
    assert reciprocal_rank(scores, labels, relevant_from=3) == 0.0


def test_pair_accuracy_by_hand_counts_ties_half_and_skips_equal_labels():
    # Labels 2, 1, 1, 0: five pairs differ. (2 over 1) tied, (2 over 1) right, (2 over 0) wrong,
    # (1 over 0) wrong, (1 over 0) wrong: 1.5 of 5.
    found = rank_metrics([np.array([3.0, 3.0, 1.0, 9.0])], [np.array([2, 1, 1, 0])])
    assert found["pair_accuracy"] == pytest.approx(1.5 / 5)


def test_pair_accuracy_weighs_every_pair_alike_and_not_every_group():
    # One right pair in the first group; in the second, three wrong ones.
    scores = [np.array([1.0, 0.0]), np.array([0.0, 1.0, 2.0, 3.0])]
    labels = [np.array([1, 0]), np.array([1, 0, 0, 0])]
    assert rank_metrics(scores, labels)["pair_accuracy"] == 1 / 4


def test_pair_accuracy_agrees_with_a_loop_over_pairs():
    scores, labels = random_groups(seed=5)
    scores = [np.round(group / 3) for group in scores]  # many ties
    right = pairs = 0.0
    for s, y in zip(scores, labels, strict=True):
        for i in range(len(s)):
            for j in range(i):
                if y[i] != y[j]:
                    pairs += 1
                    right += 0.5 if s[i] == s[j] else float((s[i] > s[j]) == (y[i] > y[j]))
    assert rank_metrics(scores, labels)["pair_accuracy"] == pytest.approx(right / pairs, rel=1e-12)


def test_a_model_that_scores_every_pair_alike_gets_the_worst_ranking_whatever_the_order_of_the_file():
    for labels in ([1, 0, 0, 0], [0, 0, 1, 0], [0, 0, 0, 1]):
        found = rank_metrics([np.zeros(4)], [np.array(labels)])
        assert found["ndcg@10"] == pytest.approx(1 / math.log2(5))
        assert found["mrr@10"] == found["map"] == 1 / 4
        assert found["pair_accuracy"] == 0.5


def test_a_tie_counts_against_the_model_only_among_the_tied_documents():
    # Rank 1 is the untied 0; then the tied 0, 1 and 2 in this order.
    assert reciprocal_rank([5.0, 5.0, 9.0, 5.0], [2, 1, 0, 0]) == 1 / 3


def test_the_order_of_documents_does_not_change_any_metric():
    rng = np.random.default_rng(11)
    scores, labels = random_groups(seed=9)
    scores = [np.round(group / 3) for group in scores]
    orders = [rng.permutation(len(group)) for group in scores]
    moved_scores = [s[order] for s, order in zip(scores, orders, strict=True)]
    moved_labels = [y[order] for y, order in zip(labels, orders, strict=True)]
    assert rank_metrics(moved_scores, moved_labels) == rank_metrics(scores, labels)


def test_mrr_and_ndcg_stop_at_k_and_map_does_not():
    scores, labels = [np.arange(12.0)[::-1]], [np.eye(12)[10]]  # the relevant document at rank 11
    found = rank_metrics(scores, labels)
    assert (found["ndcg@10"], found["mrr@10"], found["map"]) == (0.0, 0.0, 1 / 11)
    deeper = rank_metrics(scores, labels, k=11)
    assert (deeper["ndcg@11"], deeper["mrr@11"]) == (pytest.approx(1 / math.log2(12)), 1 / 11)


def test_the_ideal_ranking_uses_every_document_of_the_group():
    # Two relevant documents, of which the first k=1 rank holds one with the smaller label.
    assert ndcg([2.0, 1.0], [1, 3], k=1) == pytest.approx(1 / 3)


def test_a_negative_label_has_no_gain():
    assert ndcg([3.0, 2.0, 1.0], [-5, 1, -5]) == pytest.approx(1 / math.log2(3))


def test_soft_labels_are_gains_in_ndcg_and_relevant_from_a_threshold():
    scores, labels = [np.array([3.0, 2.0, 1.0])], [np.array([0.4, 0.8, 0.0], dtype=np.float32)]
    found = rank_metrics(scores, labels, relevant_from=0.5)
    ideal = 0.8 + 0.4 / math.log2(3)
    assert found["ndcg@10"] == pytest.approx((0.4 + 0.8 / math.log2(3)) / ideal, rel=1e-6)
    assert found["mrr@10"] == found["map"] == 1 / 2


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("threshold", [0.1, 0.7, np.float64(0.7)])
def test_a_label_that_equals_the_threshold_is_relevant_in_both_precisions(dtype, threshold):
    # float32 0.7 is below float64 0.7, and float32 0.1 above float64 0.1.
    found = rank_metrics([np.array([1.0])], [np.array([threshold], dtype=dtype)], relevant_from=threshold)
    assert found["queries"] == found["mrr@10"] == found["map"] == 1.0


def test_queries_without_a_relevant_document_are_counted_and_left_out_of_the_means():
    scores = [np.array([1.0, 0.0]), np.array([1.0, 0.0]), np.array([])]
    labels = [np.array([1, 0]), np.array([0, 0]), np.array([])]
    found = rank_metrics(scores, labels)
    assert (found["queries"], found["queries_without_relevant"]) == (1.0, 2.0)
    assert found["ndcg@10"] == found["mrr@10"] == found["map"] == 1.0


def test_pair_accuracy_counts_groups_without_a_relevant_document_too():
    found = rank_metrics([np.array([0.0, 1.0])], [np.array([0.5, 0.0])])
    assert found["queries"] == 0.0
    assert found["pair_accuracy"] == 0.0


@pytest.mark.parametrize("groups", [[], [[0, 0]]])
def test_means_over_no_query_are_nan(groups):
    labels = [np.array(group) for group in groups]
    found = rank_metrics([np.arange(len(group)) for group in labels], labels)
    assert all(math.isnan(found[key]) for key in ("ndcg@10", "mrr@10", "map", "pair_accuracy"))
    assert (found["queries"], found["queries_without_relevant"]) == (0.0, float(len(groups)))


def test_single_metrics_are_zero_without_a_relevant_document():
    assert ndcg([1.0, 2.0], [0, -1]) == 0.0
    assert reciprocal_rank([1.0, 2.0], [0, 0]) == 0.0
    assert average_precision([1.0, 2.0], [0, 0]) == 0.0
    assert ndcg([], []) == reciprocal_rank([], []) == average_precision([], []) == 0.0


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_score_that_is_not_finite_names_its_group_and_document(bad):
    scores = [np.array([1.0]), np.array([0.0, bad, bad])]
    message = rf"group 1 has 2 of 3 scores that are not finite, .*\({bad}\) at document 1"
    with pytest.raises(ValueError, match=message):
        rank_metrics(scores, [np.array([1]), np.array([1, 0, 0])])


def test_lengths_that_differ_are_refused():
    with pytest.raises(ValueError, match="2 groups of scores but 1 of labels"):
        rank_metrics([np.zeros(1), np.zeros(1)], [np.zeros(1)])
    with pytest.raises(ValueError, match=r"group 0 has scores of shape \[3\] but labels of shape \[2\]"):
        rank_metrics([np.zeros(3)], [np.zeros(2)])
