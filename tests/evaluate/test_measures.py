import math
import random

import pytest

from rag_retrieval.data.beir import trec_order
from rag_retrieval.evaluate.measures import check_measures, measure, measure_queries, perfect_run

pytest.importorskip("ir_measures")


def test_figures_equal_values_by_hand():
    qrels = {"a": {"x": 2, "y": 1, "z": 0}, "b": {"u": 1}}
    run = {"a": {"z": 3.0, "y": 2.0, "x": 1.0}, "b": {"u": 1.0, "v": 0.5}}
    figures = measure(qrels, run)
    ndcg_a = (1 / math.log2(3) + 2 / math.log2(4)) / (2 / math.log2(2) + 1 / math.log2(3))
    assert figures["ndcg@10"] == pytest.approx((ndcg_a + 1) / 2)
    assert figures["mrr@10"] == pytest.approx((1 / 2 + 1) / 2)
    assert figures["map"] == pytest.approx(((1 / 2 + 2 / 3) / 2 + 1) / 2)
    more = measure(qrels, run, ["recall@1", "recall@2", "p@2", "p@5"])
    assert more == pytest.approx({"recall@1": 0.5, "recall@2": 0.75, "p@2": 0.5, "p@5": (2 / 5 + 1 / 5) / 2})


def slow_figures(qrels, run, k, relevant_from):
    """nDCG@k, MRR@k, MAP, recall@k and P@k of one query by their definitions."""
    order = trec_order(run)
    gains = [max(qrels.get(document, 0), 0) for document in order]
    relevant = [qrels.get(document, 0) >= relevant_from for document in order]
    number = sum(grade >= relevant_from for grade in qrels.values())
    ideal = sorted((max(grade, 0) for grade in qrels.values()), reverse=True)
    dcg = [sum(gain / math.log2(rank + 2) for rank, gain in enumerate(row[:k])) for row in (gains, ideal)]
    hits = [rank for rank, hit in enumerate(relevant, start=1) if hit]
    precisions = [place / rank for place, rank in enumerate(hits, start=1)]
    return {
        f"ndcg@{k}": dcg[0] / dcg[1] if dcg[1] else 0,
        f"mrr@{k}": 1 / hits[0] if hits and hits[0] <= k else 0,
        "map": sum(precisions) / number if number else 0,
        f"recall@{k}": sum(relevant[:k]) / number if number else 0,
        f"p@{k}": sum(relevant[:k]) / k,
    }


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("relevant_from", [1, 2])
def test_all_measures_equal_their_definitions_with_ties_unjudged_and_missing_documents(seed, relevant_from):
    draw = random.Random(seed)
    names = [f"d{number}" for number in range(30)]
    qrels, run = {}, {}
    for query in "abcdef":
        qrels[query] = {name: draw.choice([-1, 0, 0, 1, 2, 3]) for name in draw.sample(names, 12)}
        run[query] = {name: draw.choice([0.5, 1.0, 2.0, 3.0]) for name in draw.sample(names, 20)}
    for k in (1, 3, 7):
        wanted = {query: slow_figures(qrels[query], run[query], k, relevant_from) for query in qrels}
        found = measure_queries(qrels, run, list(wanted["a"]), relevant_from)
        for name, values in found.items():
            assert values == pytest.approx({query: wanted[query][name] for query in qrels}), name


def test_equal_scores_are_ordered_by_the_greater_id_for_every_measure():
    names = ["ndcg@10", "mrr@10", "map", "p@1", "recall@1"]
    alike = {"a": {"x": 1.0, "y": 1.0}}
    assert measure({"a": {"y": 1}}, alike, names) == dict.fromkeys(names, 1.0)
    below = measure({"a": {"x": 1}}, alike, names)
    assert below == pytest.approx({"ndcg@10": 1 / math.log2(3), "mrr@10": 0.5, "map": 0.5, "p@1": 0, "recall@1": 0})


def test_queries_come_in_the_order_of_the_judgments_and_those_without_a_run_count_zero():
    qrels = {"b": {"u": 1}, "a": {"x": 1}, "none": {"x": 0}}
    found = measure_queries(qrels, {"a": {"x": 1.0}, "none": {"x": 1.0}, "unjudged": {"x": 1.0}}, ["mrr@10"])
    assert list(found["mrr@10"].items()) == [("b", 0.0), ("a", 1.0), ("none", 0.0)]


def test_a_relevant_document_that_the_list_lacks_lowers_the_figures_and_the_ceiling():
    run = {"a": {"x": 2.0, "w": 1.0}}
    missed = {"a": {"x": 1, "elsewhere": 1}}
    assert measure({"a": {"x": 1}}, run)["ndcg@10"] == 1
    ceiling = measure(missed, perfect_run(missed, run))
    assert ceiling["ndcg@10"] == pytest.approx(1 / (1 + 1 / math.log2(3)))
    assert ceiling["map"] == pytest.approx(1 / 2)


def test_the_ceiling_is_the_best_of_all_orders():
    qrels, candidates = {"a": {"x": 1, "y": 3}}, {"a": {"w": 3.0, "x": 2.0, "y": 1.0}}
    assert perfect_run(qrels, candidates) == {"a": {"w": 0.0, "x": 1.0, "y": 3.0}}
    assert measure(qrels, perfect_run(qrels, candidates))["ndcg@10"] == 1


@pytest.mark.parametrize("name", ["ndcg", "map@10", "NDCG@10", "hit@3", "p@0", "mrr@x"])
def test_an_unknown_measure_is_refused_with_the_known_ones(name):
    with pytest.raises(ValueError, match="expected ndcg@k, mrr@k, map, recall@k or p@k"):
        check_measures([name])
