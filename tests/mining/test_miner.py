from collections import Counter

import numpy as np
import pytest
from mining_samples import corpus_of
from tiny_models import TEXTS

from rag_retrieval import Embedder, Reranker
from rag_retrieval.infer.torch_backend import TorchBackend
from rag_retrieval.mining.config import MiningConfig
from rag_retrieval.mining.miner import RandomSearch, below_positives, draw, fit_places, guided, rerank
from rag_retrieval.mining.queries import Query
from rag_retrieval.models.options import LongDocumentOptions
from rag_retrieval.retrieval.candidates import Candidates

TRUNCATE = LongDocumentOptions(long_document="truncate")


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_scores_are_those_of_compute_score(load_tiny, tmp_path, family):
    scorer = load_tiny(family)
    query = Query("what is a panda", np.array([2, 5]), [1.0, 1.0])
    reranker = Reranker.from_backend(TorchBackend(scorer))
    scores, of_positives = rerank(reranker, query, np.array([7, 0]), corpus_of(tmp_path, list(TEXTS)), TRUNCATE)
    expected = scorer.compute_score([(query.text, TEXTS[row]) for row in (7, 0, 2, 5)]).numpy()
    np.testing.assert_allclose(np.concatenate([scores, of_positives]), expected, atol=1e-5)
    assert len(scores) == 2


def test_long_documents_are_read_as_the_reranker_reads_them(load_tiny, tmp_path):
    reranker = Reranker.from_backend(TorchBackend(load_tiny("bert", max_length=48)))
    texts = [TEXTS[0], " ".join(TEXTS) * 2, TEXTS[1]]
    query, corpus = Query(TEXTS[2], np.array([0]), [1.0]), corpus_of(tmp_path, texts)
    for long_document in ("truncate", "max_slice", "mean_slice"):
        results = reranker.rerank(query.text, texts, long_document=long_document, overlap=5)
        expected = {result.document_index: result.score for result in results}
        options = LongDocumentOptions(long_document=long_document, overlap=5)
        scores, of_positives = rerank(reranker, query, np.array([1, 2]), corpus, options)
        assert [*of_positives, *scores] == pytest.approx([expected[place] for place in range(3)], abs=1e-5)


def test_no_candidates_are_no_scores(model_folders, tmp_path):
    query = Query("panda", np.array([0]), [1.0])
    reranker = Reranker(model_folders["bert"], device="cpu")
    scores, of_positives = rerank(reranker, query, np.array([], np.int64), corpus_of(tmp_path, ["a"]), TRUNCATE)
    assert len(scores) == 0 and len(of_positives) == 1


def test_nonfinite_scores_are_refused_and_not_compared_with_margins(load_tiny, tmp_path):
    scorer = load_tiny("bert")
    scorer.model.classifier.bias.data += float("nan")
    query = Query("panda", np.array([0]), [1.0])
    with pytest.raises(ValueError, match="query 'panda'.*nan"):
        reranker = Reranker.from_backend(TorchBackend(scorer))
        rerank(reranker, query, np.array([1]), corpus_of(tmp_path, ["a", "b"]), TRUNCATE)


def rules(**options):
    return MiningConfig(data="folder", output="out.jsonl", **{"num_negatives": 3, "seed": 0} | options)


def query(text="q", *positives):
    return Query(text, np.array(positives, np.int64), [1.0] * len(positives))


def fit(tmp_path, texts, asked, first_rank=1):
    rows = np.arange(len(texts))
    candidates = Candidates(rows, np.linspace(1, 0, len(texts), dtype=np.float32), np.ones(1, np.float32))
    dropped = Counter()
    return fit_places(asked, candidates, corpus_of(tmp_path, texts), first_rank, dropped), +dropped


def test_positives_and_texts_said_before_are_left_out_with_their_reasons(tmp_path):
    texts = ["a", "Panda  eats", "b", "panda EATS", "A", "which panda", "b ", "c", "a"]
    places, dropped = fit(tmp_path, texts, query("Which PANDA", 1))
    assert places == [0, 2, 7]
    reasons = {"positive": 1, "positive_text": 1, "repeated_text": 3, "query_text": 1}
    assert dropped == reasons


def test_the_document_that_is_the_query_itself_is_no_negative(tmp_path):
    asked = Query("q", np.array([1], np.int64), [1.0], identical=(2, 1))
    assert fit(tmp_path, ["a", "b", "c", "d"], asked) == ([0, 3], {"positive": 1, "identical_id": 1})


def test_a_document_without_text_is_no_negative(tmp_path):
    assert fit(tmp_path, ["", "b", " "], query("q")) == ([1], {"no_text": 2})


def test_a_text_before_the_window_is_no_reason_to_drop_its_repetition(tmp_path):
    places, dropped = fit(tmp_path, ["a", "b", "a", "b", "c"], query("q"), first_rank=3)
    assert places == [2, 3, 4]
    assert dropped == {"before_window": 2}


def test_a_window_behind_all_candidates_is_empty(tmp_path):
    assert fit(tmp_path, ["a", "b"], query("q"), first_rank=9) == ([], {"before_window": 2})


def test_margins_are_measured_from_the_lowest_positive():
    cases = [
        ({}, [1, 1, 1, 1]),
        ({"absolute_margin": 0.0}, [0, 1, 1, 1]),
        ({"absolute_margin": 0.5}, [0, 0, 1, 1]),
        ({"relative_margin": 0.25}, [0, 0, 1, 1]),
        ({"absolute_margin": 0.5, "relative_margin": 0.75}, [0, 0, 0, 1]),
        ({"max_score": 1.0}, [0, 0, 1, 1]),
        ({"absolute_margin": 1.5, "max_score": 0.0}, [0, 0, 0, 1]),
    ]
    for options, expected in cases:
        scores, dropped = np.array([3, 2, 1, -1], np.float32), Counter()
        kept = below_positives(scores, np.array([9, 2], np.float32), rules(**options), dropped)
        assert kept.tolist() == [bool(value) for value in expected]
        assert sum(dropped.values()) == 4 - sum(expected)


def test_a_relative_margin_goes_down_from_a_score_below_zero():
    kept = below_positives(np.array([-2.9, -3.0], "f4"), np.array([-2], "f4"), rules(relative_margin=0.5), Counter())
    assert kept.tolist() == [False, True]


def test_each_candidate_above_both_limits_is_counted_once():
    dropped = Counter()
    below_positives(np.array([3.0, 1.5]), np.array([2.0]), rules(absolute_margin=0.0, max_score=1.0), dropped)
    assert dropped == {"margin": 1, "max_score": 1}


def test_a_draw_depends_on_seed_and_query_and_comes_in_order():
    places = np.arange(50)
    first = draw(query("a"), places, rules(), Counter()).tolist()
    assert first == sorted(set(first)) and len(first) == 3
    assert draw(query("a"), places, rules(), Counter()).tolist() == first
    others = [draw(query("b"), places, rules(), Counter()), draw(query("a"), places, rules(seed=1), Counter())]
    assert all(other.tolist() != first for other in others)


def test_every_place_is_drawn_equally_often():
    counts = Counter()
    for number in range(3000):
        counts.update(draw(query(f"q{number}"), np.arange(10), rules(), Counter()).tolist())
    assert sorted(counts) == list(range(10))
    assert all(abs(count - 900) < 130 for count in counts.values()), "five standard deviations of 25"


def test_the_best_are_taken_in_order_without_a_draw():
    dropped = Counter()
    assert draw(query("a"), np.array([4, 6, 8, 9]), rules(sampling="top"), dropped).tolist() == [4, 6, 8]
    assert dropped == {"not_drawn": 1}


def test_fewer_that_fit_are_all_taken():
    assert draw(query("a"), np.array([4, 6]), rules(), Counter()).tolist() == [4, 6]


def test_random_candidates_are_other_documents_for_each_query_and_seed():
    """Each once, the same for the same seed and query whatever the other queries are, and all of them equally often."""
    queries, none = [f"question {place}" for place in range(400)], [np.zeros(2, np.int64)] * 400
    found = RandomSearch(20, 7).search(queries, none, 5)
    assert all(len(set(each.rows.tolist())) == 5 and not each.scores.any() for each in found)
    assert [len(each.judged_scores) for each in found] == [2] * 400
    alone = RandomSearch(20, 7).search(queries[3:4], none[:1], 5)[0]
    assert alone.rows.tolist() == found[3].rows.tolist()
    assert RandomSearch(20, 8).search(queries[3:4], none[:1], 5)[0].rows.tolist() != alone.rows.tolist()
    counts = np.bincount(np.concatenate([each.rows for each in found]), minlength=20)
    assert counts.min() > 70 and counts.max() < 130, "100 each, with a deviation of 9"
    assert len(RandomSearch(3, 7).search(["q"], none[:1], 5)[0].rows) == 3, "a corpus has no more"


def test_a_guides_scores_are_similarities_of_its_vectors_in_the_order_of_the_candidates(base_folders, tmp_path):
    guide = Embedder(base_folders["bert"], device="cpu", pooling="mean", prompts={"query": "query: "})
    corpus = corpus_of(tmp_path, list(TEXTS))
    asked = [Query("panda", np.array([2, 5]), [1.0, 1.0]), Query("水", np.array([5]), [1.0])]
    none = np.zeros(0, np.float32)
    found = [Candidates(np.array(rows), none, none) for rows in ([7, 0, 3], [3])]
    for query, before, after in zip(asked, found, guided(guide, asked, found, corpus), strict=True):
        vector = guide.encode_queries(query.text)
        rows = [*before.rows.tolist(), *query.positives.tolist()]
        expected = guide.encode_documents([TEXTS[row] for row in rows]) @ vector
        assert after.rows.tolist() == before.rows.tolist()
        np.testing.assert_allclose(np.concatenate([after.scores, after.judged_scores]), expected, atol=1e-5)
