"""Ranking metrics by hand, and against trec_eval (through ir_measures) with ties, unjudged and missing documents."""

import math
import random

import numpy as np
import pytest

from rag_retrieval.metrics import (
    METRICS,
    group_metrics,
    means,
    metric_value,
    parse_metric,
    perfect_run,
    query_metrics,
    rank_group,
    relevance_threshold,
    run_metrics,
    trec_order,
)

ALL = ["ndcg@10", "mrr@10", "map", "recall@1", "p@1", "err@10"]


def value(name: str, scores, labels, relevant_from: float = 1.0, highest: float = 1.0) -> float:
    return metric_value(name, rank_group(scores, labels, relevant_from, highest))


def random_groups(seed: int, count: int = 40) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Groups of 1 to 30 documents with tied scores, labels -1 to 3; each has a document of label 2."""
    rng = np.random.default_rng(seed)
    scores, labels = [], []
    for size in rng.integers(1, 31, size=count):
        scores.append(rng.integers(0, 8, size=size) / 4)
        graded = rng.choice([-1, 0, 0, 0, 1, 2, 3], size=size)
        graded[rng.integers(size)] = 2
        labels.append(graded)
    return scores, labels


# ---- the definitions ---------------------------------------------------------------------------------------------


def test_metrics_of_one_query_by_hand():
    # labels by rank: 0, 2, 1, 0
    scores, labels = [1.0, 4.0, 2.0, 3.0], [0, 0, 1, 2]
    dcg = 2 / math.log2(3) + 1 / math.log2(4)
    ideal = 2 / math.log2(2) + 1 / math.log2(3)
    assert value("ndcg@10", scores, labels) == pytest.approx(dcg / ideal, rel=1e-12)
    assert value("mrr@10", scores, labels) == 1 / 2
    assert value("map", scores, labels) == pytest.approx((1 / 2 + 2 / 3) / 2, rel=1e-12)
    assert value("mrr@10", scores, labels, relevant_from=3) == 0.0
    assert (value("recall@2", scores, labels), value("p@2", scores, labels), value("p@5", scores, labels)) == (
        1 / 2, 1 / 2, 2 / 5
    )  # fmt: skip


def test_expected_reciprocal_rank_by_hand():
    # highest grade 2: the chances to stop are 0, 3/4, 1/4, 0 at ranks 1 to 4
    scores, labels = [1.0, 4.0, 2.0, 3.0], [0, 0, 1, 2]
    assert value("err@10", scores, labels, highest=2) == pytest.approx(1 / 2 * 3 / 4 + 1 / 3 * 1 / 4 * 1 / 4)
    assert value("err@2", scores, labels, highest=2) == pytest.approx(3 / 8)
    # the same grades where the data go to 4: chances 3/16 and 1/16
    assert value("err@10", scores, labels, highest=4) == pytest.approx(1 / 2 * 3 / 16 + 1 / 3 * 13 / 16 * 1 / 16)
    assert value("err@3", [1.0], [-2], highest=2) == 0.0


def test_cutoffs_end_the_list_but_not_for_map():
    scores, labels = np.arange(12.0)[::-1], np.eye(12)[10]  # the relevant document at rank 11
    shallow = [value(name, scores, labels) for name in ("ndcg@10", "mrr@10", "map", "recall@10", "p@10", "err@10")]
    assert shallow == [0.0, 0.0, 1 / 11, 0.0, 0.0, 0.0]
    deeper = [value(name, scores, labels) for name in ("ndcg@11", "mrr@11", "recall@11", "p@11", "err@11")]
    assert deeper == pytest.approx([1 / math.log2(12), 1 / 11, 1.0, 1 / 11, 1 / 22])


def test_the_ideal_ranking_has_every_document_and_negative_labels_no_gain():
    assert value("ndcg@1", [2.0, 1.0], [1, 3]) == pytest.approx(1 / 3)
    assert value("ndcg@10", [3.0, 2.0, 1.0], [-5, 1, -5]) == pytest.approx(1 / math.log2(3))


def test_of_equal_scores_the_last_document_of_a_group_ranks_first():
    for labels, rank in (([1, 0, 0, 0], 4), ([0, 0, 1, 0], 2), ([0, 0, 0, 1], 1)):
        assert value("ndcg@10", np.zeros(4), labels) == pytest.approx(1 / math.log2(rank + 1))
        assert value("mrr@10", np.zeros(4), labels) == value("map", np.zeros(4), labels) == 1 / rank
    assert value("mrr@10", [5.0, 5.0, 9.0, 5.0], [1, 0, 0, 0]) == 1 / 4


def test_of_equal_scores_the_greater_id_of_a_run_ranks_first():
    assert trec_order({"a": 1.0, "c": 1.0, "b": 2.0, "é": 1.0}) == ["b", "é", "c", "a"]
    assert trec_order({"a": 16777217.0, "b": 16777216.0}) == ["b", "a"], "equal in float32"
    assert trec_order({}) == []
    alike = {"a": {"x": 1.0, "y": 1.0}}
    assert run_metrics({"a": {"y": 1}}, alike, ALL) == dict.fromkeys(ALL, 1.0) | {"err@10": 0.5}
    below = run_metrics({"a": {"x": 1}}, alike, ALL)
    assert list(below.values()) == pytest.approx([1 / math.log2(3), 0.5, 0.5, 0, 0, 0.25])


def test_runs_and_groups_of_the_same_documents_have_equal_figures():
    scores, labels = random_groups(seed=3)
    run = {f"q{q}": {f"d{d:02}": float(s) for d, s in enumerate(group)} for q, group in enumerate(scores)}
    qrels = {f"q{q}": {f"d{d:02}": int(y) for d, y in enumerate(group)} for q, group in enumerate(labels)}
    of_groups = group_metrics(scores, labels, names=ALL)
    assert run_metrics(qrels, run, ALL) == {name: of_groups[name] for name in ALL}


def test_all_metrics_equal_those_of_trec_eval():
    """Scores tie, documents are unjudged or not ranked, grades are negative, queries have no run."""
    ir_measures = pytest.importorskip("ir_measures")
    from ir_measures import AP, RR, P, R, nDCG

    for seed in range(8):
        draw, relevant_from = random.Random(seed), 1 + seed % 2
        names = [f"d{number}" for number in range(30)]
        qrels, run = {}, {}
        for query in map(str, range(20)):
            judged = draw.sample(names, 12)
            qrels[query] = {name: draw.choice([-1, 0, 0, 1, 2, 3]) for name in judged} | {judged[0]: 2}
            run[query] = {name: draw.choice([0.5, 1.0, 2.0, 3.0]) for name in draw.sample(names, 20)}
        del run["3"]
        for k in (1, 3, 10):
            theirs = {
                f"ndcg@{k}": nDCG @ k, "map": AP(rel=relevant_from), f"p@{k}": P(rel=relevant_from) @ k,
                f"recall@{k}": R(rel=relevant_from) @ k, "mrr@1000": RR(rel=relevant_from),
            }  # fmt: skip
            ours = query_metrics(qrels, run, list(theirs), relevant_from)
            for name, measure in theirs.items():
                # ir_measures leaves a query without a run out
                wanted = {row.query_id: row.value for row in ir_measures.iter_calc([measure], qrels, run)} | {"3": 0.0}
                assert ours[name] == pytest.approx(wanted, abs=1e-9), (seed, name)


def slow_expected_reciprocal_rank(grades: list[int], highest: int, k: int) -> float:
    total, goes_on = 0.0, 1.0
    for rank, grade in enumerate(grades[:k], 1):
        stops = (2 ** max(grade, 0) - 1) / 2**highest
        total, goes_on = total + goes_on * stops / rank, goes_on * (1 - stops)
    return total


def test_expected_reciprocal_rank_equals_a_plain_loop():
    draw = random.Random(5)
    qrels = {query: {f"d{place}": draw.randrange(-1, 4) for place in range(15)} for query in "abc"} | {"d": {"x": 5}}
    run = {query: {document: draw.random() for document in judged} for query, judged in qrels.items()}
    for query in "abc":
        grades = [qrels[query][document] for document in trec_order(run[query])]
        values = query_metrics(qrels, run, ["err@4"])["err@4"][query]
        assert values == pytest.approx(slow_expected_reciprocal_rank(grades, 5, 4))


# ---- which queries count -----------------------------------------------------------------------------------------


def test_runs_and_groups_leave_out_queries_without_relevant_documents():
    qrels = {"b": {"u": 1}, "none": {"x": 0}, "a": {"x": 1}, "low": {"x": 1, "y": 0}}
    run = {"a": {"x": 1.0}, "none": {"x": 1.0}, "low": {"x": 1.0}, "unjudged": {"x": 1.0}}
    values = query_metrics(qrels, run, ["mrr@10"])["mrr@10"]
    assert list(values.items()) == [("b", 0.0), ("a", 1.0), ("low", 1.0)], "one without a run counts 0"
    assert list(query_metrics(qrels | {"high": {"x": 2}}, run, ["map"], relevant_from=2)["map"]) == ["high"]
    groups = [np.array([1.0, 0.0]), np.array([1.0, 0.0]), np.array([])], [np.array([1, 0]), np.zeros(2), np.array([])]
    values = group_metrics(*groups)
    assert (values["queries"], values["queries_without_relevant"]) == (1.0, 2.0)
    assert values["ndcg@10"] == values["mrr@10"] == values["map"] == 1.0


def test_means_over_no_query_are_nan():
    assert math.isnan(means({"map": {}})["map"])
    for groups in ([], [[0, 0]]):
        labels = [np.array(group) for group in groups]
        values = group_metrics([np.arange(len(group)) for group in labels], labels)
        assert all(math.isnan(values[key]) for key in ("ndcg@10", "mrr@10", "map", "pair_accuracy"))
        assert (values["queries"], values["queries_without_relevant"]) == (0.0, float(len(groups)))


def test_a_query_without_a_ranked_relevant_document_has_zero():
    for scores, labels in (([1.0, 2.0], [0, -1]), ([], [])):
        assert [value(name, scores, labels) for name in ALL] == [0.0] * len(ALL)


def test_soft_labels_are_gains_and_relevant_from_a_threshold():
    scores, labels = [np.array([3.0, 2.0, 1.0])], [np.array([0.4, 0.8, 0.0], dtype=np.float32)]
    values = group_metrics(scores, labels, relevant_from=0.5)
    ideal = 0.8 + 0.4 / math.log2(3)
    assert values["ndcg@10"] == pytest.approx((0.4 + 0.8 / math.log2(3)) / ideal, rel=1e-6)
    assert values["mrr@10"] == values["map"] == 1 / 2


def test_a_label_that_equals_the_threshold_is_relevant_in_both_precisions():
    # float32 0.7 is below float64 0.7, and float32 0.1 above float64 0.1
    for dtype in (np.float32, np.float64):
        for threshold in (0.1, 0.7, np.float64(0.7)):
            values = group_metrics([np.ones(1)], [np.array([threshold], dtype=dtype)], relevant_from=threshold)
            assert values["queries"] == values["mrr@10"] == values["map"] == 1.0


# ---- ceilings, pair accuracy, names, mistakes --------------------------------------------------------------------


def test_a_relevant_document_missing_from_the_candidates_lowers_the_ceiling():
    run = {"a": {"x": 2.0, "w": 1.0}}
    missed = {"a": {"x": 1, "elsewhere": 1}}
    assert run_metrics({"a": {"x": 1}}, run, ["ndcg@10"]) == {"ndcg@10": 1.0}
    ceiling = run_metrics(missed, perfect_run(missed, run), ["ndcg@10", "map"])
    assert ceiling == pytest.approx({"ndcg@10": 1 / (1 + 1 / math.log2(3)), "map": 1 / 2})


def test_the_ceiling_is_the_best_of_all_orders():
    qrels, candidates = {"a": {"x": 1, "y": 3}}, {"a": {"w": 3.0, "x": 2.0, "y": 1.0}}
    assert perfect_run(qrels, candidates) == {"a": {"w": 0.0, "x": 1.0, "y": 3.0}}
    assert run_metrics(qrels, perfect_run(qrels, candidates), ["ndcg@10"]) == {"ndcg@10": 1.0}


def test_pair_accuracy_by_hand_counts_ties_half_and_skips_equal_labels():
    # Labels 2, 1, 1, 0: five pairs differ. (2 over 1) tied, (2 over 1) right, (2 over 0) wrong,
    # (1 over 0) wrong, (1 over 0) wrong: 1.5 of 5.
    values = group_metrics([np.array([3.0, 3.0, 1.0, 9.0])], [np.array([2, 1, 1, 0])])
    assert values["pair_accuracy"] == pytest.approx(1.5 / 5)


def test_pair_accuracy_is_over_all_pairs_of_all_groups():
    # One right pair in the first group; in the second, three wrong ones.
    scores = [np.array([1.0, 0.0]), np.array([0.0, 1.0, 2.0, 3.0])]
    labels = [np.array([1, 0]), np.array([1, 0, 0, 0])]
    assert group_metrics(scores, labels)["pair_accuracy"] == 1 / 4
    values = group_metrics([np.array([0.0, 1.0])], [np.array([0.5, 0.0])])
    assert (values["queries"], values["pair_accuracy"]) == (0.0, 0.0)


def test_pair_accuracy_agrees_with_a_loop_over_pairs():
    scores, labels = random_groups(seed=5)
    right = pairs = 0.0
    for s, y in zip(scores, labels, strict=True):
        for i in range(len(s)):
            for j in range(i):
                if y[i] != y[j]:
                    pairs += 1
                    right += 0.5 if s[i] == s[j] else float((s[i] > s[j]) == (y[i] > y[j]))
    assert group_metrics(scores, labels)["pair_accuracy"] == pytest.approx(right / pairs, rel=1e-12)


def test_names_have_a_cutoff_where_the_metric_has_one():
    assert parse_metric("ndcg@10") == (METRICS["ndcg"], 10) and parse_metric("map") == (METRICS["map"], None)
    assert [parse_metric(f"{name}@3")[1] for name in ("mrr", "recall", "p", "err")] == [3] * 4
    for name in ("ndcg", "map@10", "NDCG@10", "hit@3", "p@0", "mrr@x", "ndcg@" + "9" * 20, "ndcg@10 ", ""):
        with pytest.raises(ValueError) as error:
            parse_metric(name)
        assert repr(name) in str(error.value) and "mrr@k, map, recall@k" in str(error.value)


@pytest.mark.parametrize("bad", [[0.0, float("nan"), 1.0], [0.0, float("inf"), 1.0], [0.0, 1.0]])
def test_a_group_without_a_finite_score_for_each_label_is_named(bad):
    with pytest.raises(ValueError, match="group 1: .* 3 labels"):
        group_metrics([np.array([1.0]), np.array(bad)], [np.array([1]), np.array([1, 0, 0])])


def test_as_many_groups_of_labels_as_of_scores_are_needed():
    with pytest.raises(ValueError):
        group_metrics([np.zeros(1), np.zeros(1)], [np.zeros(1)])


def test_relevance_begins_at_1_for_whole_labels_else_in_the_middle():
    assert relevance_threshold(np.array([0, 1, 3], np.float32)) == 1.0
    assert relevance_threshold(np.array([0.1, 0.9], np.float32)) == pytest.approx(0.5)
