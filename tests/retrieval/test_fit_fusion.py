"""Weights from judged queries, against a slow search through all of them with the metrics of evaluation."""

import json

import numpy as np
import pytest

from rag_retrieval.infer.results import EMPTY_SCORE
from rag_retrieval.metrics import query_metrics
from rag_retrieval.retrieval.candidates import Candidates
from rag_retrieval.retrieval.fit_fusion import RRF, WEIGHTS, fit_fusion, fit_reranker
from rag_retrieval.retrieval.fusion import Fusion, combine

NOTHING = np.zeros(0, np.int64)
GRID = [place / 20 for place in range(21)]  # weights of bm25; the rest is dense's


def ranked(scores):
    """scores: by row."""
    rows = sorted(scores, key=lambda row: (-scores[row], row))
    values = np.array([scores[row] for row in rows], np.float32)
    return Candidates(np.array(rows, np.int64), values, np.zeros(0, np.float32))


def id_of(row):
    return f"d{row}"


def random_lists(seed, dense_helps, queries=23, documents=30):
    """Both stages see the relevant documents through noise; dense sees nothing where it does not help."""
    generator = np.random.default_rng(seed)
    found, qrels = {}, {}
    for number in range(queries):
        grades = np.zeros(documents)
        grades[generator.choice(documents, 3, replace=False)] = [1, 1, 2]
        lists = {}
        for stage, signal in (("bm25", 1.5), ("dense", 1.5 * dense_helps)):
            scores = np.round(grades * signal + generator.normal(size=documents), 1) * (10 if stage == "bm25" else 0.1)
            kept = np.argsort(-scores)[:20].tolist()
            lists[stage] = ranked({row: scores[row] for row in kept})
        found[f"q{number:02}"] = lists
        qrels[f"q{number:02}"] = {id_of(row): float(grade) for row, grade in enumerate(grades) if grade}
    return found, qrels


def slow_values(found, qrels, fusion, metric):
    """By query, as evaluation measures it."""
    run = {}
    for query, lists in found.items():
        fused = fusion.fuse(lists, NOTHING, 100)
        run[query] = dict(zip(map(id_of, fused.rows.tolist()), fused.scores.tolist(), strict=True))
    return query_metrics(qrels, run, [metric])[metric]


def slow_fit(found, qrels, metric):
    """(means by choice, weight of bm25 over all queries, by fold)."""
    by_weight = [slow_values(found, qrels, Fusion({"bm25": w, "dense": 1 - w}), metric) for w in GRID]
    names = sorted(found)

    def best(queries):
        means = [np.mean([values[query] for query in queries]) for values in by_weight]
        equal = [place for place in range(21) if means[place] >= max(means) - 1e-9]
        return min(equal, key=lambda place: abs(place - np.mean(equal)))

    chosen = [best([query for place, query in enumerate(names) if place % 5 != fold]) for fold in range(5)]
    held_out = [by_weight[chosen[place % 5]][query] for place, query in enumerate(names)]
    rrf = slow_values(found, qrels, Fusion(), metric).values()
    means = {"bm25": by_weight[20].values(), "dense": by_weight[0].values(), RRF: rrf, WEIGHTS: held_out}
    means = {name: np.mean(list(values)) for name, values in means.items()}
    return means, GRID[best(names)], [GRID[place] for place in chosen]


@pytest.mark.parametrize("metric", ["ndcg@10", "map"])
@pytest.mark.parametrize("seed", range(3))
def test_the_fit_is_that_of_a_slow_search_through_all_weights(seed, metric):
    found, qrels = random_lists(seed, dense_helps=0.5)
    means, weight, by_fold = slow_fit(found, qrels, metric)
    fit = fit_fusion(found, qrels, id_of, metric)
    assert fit.values == pytest.approx(means, abs=1e-9)
    assert fit.weights == pytest.approx({"bm25": weight, "dense": 1 - weight})
    assert [each["bm25"] for each in fit.fold_weights] == pytest.approx(by_fold)
    assert fit.values[fit.chosen] == max(fit.values.values()) and fit.queries == 23


def test_two_sides_that_help_each_other_are_weighted():
    fit = fit_fusion(*random_lists(0, dense_helps=1, queries=200), id_of)
    assert fit.chosen == WEIGHTS and fit.fusion.weights == fit.weights
    assert min(fit.weights.values()) >= 0.3


def test_a_side_that_only_hurts_is_left_out():
    fit = fit_fusion(*random_lists(1, dense_helps=0, queries=200), id_of)
    assert fit.values["bm25"] > fit.values[RRF]
    assert (fit.chosen, fit.fusion.weights) == ("bm25", {"bm25": 1.0, "dense": 0.0})


def test_of_equal_figures_one_side_alone_is_taken():
    lists = {"bm25": ranked({0: 2, 1: 1}), "dense": ranked({0: 0.5, 1: 0.25})}
    fit = fit_fusion({f"q{n}": lists for n in range(5)}, {f"q{n}": {"d0": 1} for n in range(5)}, id_of)
    assert set(fit.values.values()) == {1.0} and fit.chosen == "bm25"
    assert fit.weights == {"bm25": 0.5, "dense": 0.5}, "the middle of all that are equal"


def test_reciprocal_ranks_are_taken_where_scores_mislead():
    """The relevant document is second in both, and each first has a score far above; they are different ones."""
    lists = {"bm25": ranked({1: 100, 0: 2, 2: 1}), "dense": ranked({2: 100, 0: 2, 1: 1})}
    fit = fit_fusion({f"q{n}": lists for n in range(5)}, {f"q{n}": {"d0": 1} for n in range(5)}, id_of, "mrr@1")
    assert fit.values == {"bm25": 0, "dense": 0, RRF: 0, WEIGHTS: 0}
    lists = {"bm25": ranked({1: 100, 0: 2, 3: 1}), "dense": ranked({2: 100, 0: 2, 3: 1})}
    fit = fit_fusion({f"q{n}": lists for n in range(5)}, {f"q{n}": {"d0": 1} for n in range(5)}, id_of, "mrr@1")
    assert (fit.chosen, fit.fusion) == (RRF, Fusion()) and fit.values[RRF] == 1


def test_the_order_of_the_queries_changes_nothing(tmp_path):
    found, qrels = random_lists(2, dense_helps=1)
    for name, queries in (("one", sorted(found)), ("two", sorted(found, reverse=True))):
        fit = fit_fusion({query: found[query] for query in queries}, qrels, id_of)
        fit.fusion.save(tmp_path / name, {"split": "dev", "stages": fit.figures()})
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()
    saved = json.loads((tmp_path / "one").read_text())
    assert Fusion.read(tmp_path / "one") == fit.fusion
    assert saved["fitted"]["split"] == "dev" and saved["fitted"]["stages"]["values"] == fit.values


def test_three_stages_are_fitted_together():
    found, qrels = random_lists(3, dense_helps=1, queries=100)
    for query, lists in random_lists(4, dense_helps=0, queries=100)[0].items():
        found[query]["noise"] = lists["dense"]
    fit = fit_fusion(found, qrels, id_of)
    assert list(fit.values) == ["bm25", "dense", "noise", RRF, WEIGHTS] and fit.chosen == WEIGHTS
    assert fit.weights["noise"] <= 0.1 and sum(fit.weights.values()) == pytest.approx(1)


def test_queries_without_a_relevant_document_are_left_out_and_a_few_are_too_few():
    found, qrels = random_lists(5, dense_helps=1, queries=6)
    qrels["q00"] = {"d1": 0.0}
    assert fit_fusion(found, qrels, id_of).queries == 5
    qrels["q01"] = {}
    with pytest.raises(ValueError, match="at least 5 queries with a relevant document, found 4"):
        fit_fusion(found, qrels, id_of)


def test_a_document_with_the_id_of_its_query_is_not_ranked():
    lists = {"bm25": ranked({0: 2, 1: 1}), "dense": ranked({0: 0.5, 1: 0.25})}
    found = {query: lists for query in ("d0", "a", "b", "c", "e")}
    fit = fit_fusion(found, {query: {"d1": 1} for query in found}, id_of, "mrr@10")
    assert fit.values["bm25"] == pytest.approx((1 + 4 * 0.5) / 5)


# ---- the weight of a reranker


def reranked_lists(seed, signal, noise=1.0, queries=100, documents=20):
    """Lists of dense, which sees the relevant documents through noise, each with a reranker's scores of all of it."""
    generator = np.random.default_rng(seed)
    found, qrels = {}, {}
    for number in range(queries):
        grades = np.zeros(documents)
        grades[generator.choice(documents, 3, replace=False)] = 1
        scores = {"dense": grades + generator.normal(size=documents)}
        scores["reranked"] = 8 * (signal * grades + noise * generator.normal(size=documents)) - 4
        found[f"q{number:03}"] = {stage: ranked(dict(enumerate(values))) for stage, values in scores.items()}
        qrels[f"q{number:03}"] = {id_of(row): 1.0 for row in np.flatnonzero(grades).tolist()}
    return found, qrels


def combined_values(found, qrels, weight):
    """By query, in the order of `combine`."""
    run = {}
    for query, lists in found.items():
        by_row = [dict(zip(of.rows.tolist(), of.scores, strict=True)) for of in lists.values()]
        scores, logits = (np.array([of[row] for row in range(len(of))], np.float32) for of in by_row)
        run[query] = dict(zip(map(id_of, range(len(scores))), combine(weight, scores, logits).tolist(), strict=True))
    return query_metrics(qrels, run, ["ndcg@10"])["ndcg@10"]


def test_a_reranker_that_helps_is_mixed_in_with_the_weight_of_a_slow_search():
    found, qrels = reranked_lists(0, signal=1)
    fit = fit_reranker(found, qrels, id_of)
    means = [np.mean(list(combined_values(found, qrels, weight).values())) for weight in GRID]
    assert list(fit.values) == ["dense", "reranked", WEIGHTS] and fit.chosen == WEIGHTS
    assert (fit.values["dense"], fit.values["reranked"]) == pytest.approx((means[0], means[20]))
    assert means[round(20 * fit.fusion.weights["reranked"])] == pytest.approx(max(means))
    assert 0.3 <= fit.fusion.weights["reranked"] <= 0.7


def test_a_reranker_that_hurts_gets_no_weight_and_a_perfect_one_decides():
    assert fit_reranker(*reranked_lists(1, signal=0), id_of).fusion.weights["reranked"] <= 0.1
    fit = fit_reranker(*reranked_lists(1, signal=-1), id_of)
    assert (fit.chosen, fit.fusion.weights) == ("dense", {"dense": 1.0, "reranked": 0.0})
    fit = fit_reranker(*reranked_lists(2, signal=1, noise=0), id_of)
    assert (fit.chosen, fit.fusion.weights) == ("reranked", {"dense": 0.0, "reranked": 1.0})
    assert fit.values["reranked"] == 1


def test_documents_without_text_do_not_decide_on_the_weight():
    """Their score, far below all others, would leave the reranker no differences."""
    found, qrels = reranked_lists(0, signal=1)
    weights = fit_reranker(found, qrels, id_of).weights
    for lists in found.values():
        for stage, score in (("dense", 9), ("reranked", EMPTY_SCORE)):
            rows = dict(zip(lists[stage].rows.tolist(), lists[stage].scores.tolist(), strict=True))
            lists[stage] = ranked(rows | {99: score})
    assert fit_reranker(found, qrels, id_of).weights == weights
