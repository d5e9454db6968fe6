"""Differences and rank correlations of scores, and what is refused, by hand arithmetic."""

import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest

from rag_retrieval import ExportConfig
from rag_retrieval.export import source
from rag_retrieval.export.source import RerankerSource
from rag_retrieval.export.verify import (
    Change,
    Computed,
    DifferenceError,
    Verification,
    aligned,
    check_float32,
    check_int8,
    rank_correlation,
    sample_pairs,
)


def test_the_rank_correlation_is_spearman_s():
    # ranks 1 2 3 4 and 2 1 3 4: 1 - 6 * (1 + 1) / (4 * 15)
    assert rank_correlation(np.array([0.1, 0.2, 5, 900]), np.array([2.0, 1, 3, 4])) == pytest.approx(0.8)
    assert rank_correlation(np.arange(5.0), -np.exp(np.arange(5.0))) == pytest.approx(-1)
    # ties share their mean rank: 1 2.5 2.5 4 and 1 2 3 4: 4.5 / sqrt(4.5 * 5)
    assert rank_correlation(np.array([1.0, 2, 2, 3]), np.arange(4.0)) == pytest.approx(math.sqrt(0.9))
    assert math.isnan(rank_correlation(np.arange(3.0), np.ones(3)))


def test_float32_may_differ_by_one_in_ten_thousand_and_relatively_beyond_one():
    expected = np.array([0.0, 1.0, -20.0])

    def check(differences, of_sample: bool) -> None:
        scores, sample = expected + (0 if of_sample else differences), expected + (differences if of_sample else 0)
        computed = Computed({"dense": [sample]}, {"dense": scores}, {})
        check_float32(Computed({"dense": [expected]}, {"dense": expected}, {}), computed)

    for of_sample in (True, False):
        check([0.9e-4, -0.9e-4, 1.9e-3], of_sample)
        for wrong in ([1.1e-4, 0, 0], [0, 0, 2.1e-3], [0, math.nan, 0]):
            with pytest.raises(DifferenceError, match="dense: 1 of 3 numbers differ by more than 0.0001"):
                check(wrong, of_sample)


def test_weights_are_compared_by_token_and_vectors_in_their_order():
    one = [(np.array([3, 7]), np.array([0.5, 0.25])), (np.array([], int), np.array([]))]
    other = [(np.array([2, 7]), np.array([1e-5, 0.5])), (np.array([9]), np.array([2.0]))]
    expected, found = aligned(one, other)
    np.testing.assert_allclose(expected, [0, 0.5, 0.25, 0])  # tokens 2, 3 and 7, then 9
    np.testing.assert_allclose(found, [1e-5, 0, 0.5, 2])
    vectors = [np.eye(2), np.ones((1, 2))]
    assert [side.tolist() for side in aligned(vectors, vectors)] == [[1, 0, 0, 1, 1, 1]] * 2


def int8(correlation: float, before: float | None = None, after: float | None = None) -> Verification:
    change = Change(0.2, correlation, before, after)
    on_data = ("toy test", 4, "all 9 documents") if before else ()
    return Verification(9, 3, 8, {"scores": change}, *on_data)


def test_int8_within_its_limits_is_kept():
    assert check_int8(int8(0.98), force=False) == []
    assert check_int8(int8(0.99, 0.8000, 0.7901), force=False) == []
    assert check_int8(int8(0.99, 0.80, 0.95), force=False) == [], "better is no loss"


def test_int8_beyond_its_limits_is_refused_unless_forced():
    bad = int8(0.97, 0.80, 0.78)
    with pytest.raises(DifferenceError, match=r"0\.9700 is below 0\.98 \(scores\) and nDCG@10 falls by 0.0200"):
        check_int8(bad, force=False)
    assert check_int8(bad, force=True) == [
        "rank correlation 0.9700 is below 0.98 (scores)",
        "nDCG@10 falls by 0.0200, more than 0.01 (scores)",
    ]
    one_bad = replace(bad, changes={"dense": Change(0.1, 0.99, 0.8, 0.8), "lexical": Change(0.1, 0.99, 0.8, 0.7)})
    assert check_int8(one_bad, force=True) == ["nDCG@10 falls by 0.1000, more than 0.01 (lexical)"]
    graded = replace(bad, changes={"dense": Change(0.1, 0.99, graded_before=0.8, graded_after=0.78)})
    assert check_int8(graded, force=True) == [
        "Spearman's correlation with the labels falls by 0.0200, more than 0.01 (dense)"
    ]
    with pytest.raises(DifferenceError, match="correlation nan"):
        check_int8(int8(math.nan), force=False)


def test_a_verification_is_described_in_one_line_and_one_for_each_kind_of_score():
    assert int8(0.991, 0.8, 0.795).describe().split("\n  ") == [
        "9 pairs of 3 to 8 tokens, nDCG@10 on toy test (4 queries, all 9 documents)",
        "scores: largest difference 2.0e-01, rank correlation 0.9910, nDCG@10 0.8000 before, 0.7950 after (-0.0050)",
    ]


def reranker_source(scorer) -> RerankerSource:
    with mock.patch.object(source, "open_scorer", return_value=scorer):
        return RerankerSource(ExportConfig(model="m", output="o"), "cpu")


@pytest.mark.parametrize(("family", "max_length"), [("bert", 512), ("bert", 16), ("xlm_roberta", 100), ("llama", 300)])
def test_lengths_go_from_the_shortest_to_the_limit_in_small_steps(load_tiny, family, max_length):
    of_model = reranker_source(load_tiny(family, max_length=max_length))
    encoder = of_model.encoder
    encoded = encoder.encode(sample_pairs(of_model))
    documents = [len(pair) - pair.document_start - len(encoder.template.suffix) for pair in encoded]
    one_letter = len(encoder.text_ids(["b"], "document")[0])  # with what a decoder's format puts around it
    assert min(documents) == one_letter and max(map(len, encoded)) == max_length
    assert any(pair.truncated for pair in encoded) and not all(pair.truncated for pair in encoded)
    lengths = sorted(set(documents))
    assert all(after <= 2.2 * before + 3 for before, after in zip(lengths, lengths[1:], strict=False)), lengths


def test_there_are_english_and_chinese_texts_and_an_empty_query(load_tiny):
    pairs = sample_pairs(reranker_source(load_tiny("bert")))
    for words in ("file", "文件"):
        assert any(words in query for query, _ in pairs) and any(words in document for _, document in pairs)
    assert any(not query for query, _ in pairs) and len(set(pairs)) == len(pairs) > 20
