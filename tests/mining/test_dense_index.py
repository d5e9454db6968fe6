import numpy as np
import pytest
from mining_samples import corpus_of

from rag_retrieval.mining import dense_index
from rag_retrieval.mining.dense_index import DenseSearch, build_vectors, open_vectors
from rag_retrieval.mining.queries import Query

WIDTH = 5


def fake_encode(texts):
    """A vector from the text's number: the same for the same text, whatever stands beside it."""
    return np.array(
        [np.random.default_rng(len(text) + 31 * sum(text.encode())).normal(size=WIDTH) for text in texts], "f4"
    )


def query(text, *positives):
    return Query(text, np.array(positives, np.int64), [1.0] * len(positives))


def test_vectors_are_mapped_and_rounded_to_their_type(tmp_path):
    texts = [f"text {row}" for row in range(10)]
    build_vectors(corpus_of(tmp_path, texts), fake_encode, tmp_path, "float16")
    vectors = open_vectors(tmp_path)
    assert vectors.dtype == np.float16 and isinstance(vectors.base.base, np.memmap)
    np.testing.assert_array_equal(vectors, fake_encode(texts).astype(np.float16))


@pytest.mark.parametrize("kept", [0, 1, 59, 60, 61, 130])
def test_a_stopped_encoding_goes_on_behind_its_last_whole_block(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(dense_index, "ENCODED", 3)  # 60 bytes
    corpus = corpus_of(tmp_path, [f"text {row}" for row in range(10)])
    whole, resumed, encoded = tmp_path / "whole", tmp_path / "resumed", []
    whole.mkdir(), resumed.mkdir()
    build_vectors(corpus, fake_encode, whole, "float32")
    (resumed / "vectors").write_bytes((whole / "vectors").read_bytes()[:kept])

    def counting(texts):
        encoded.extend(texts)
        return fake_encode(texts)

    build_vectors(corpus, counting, resumed, "float32")
    assert (resumed / "vectors").read_bytes() == (whole / "vectors").read_bytes()
    assert len(encoded) == 1 + 10 - kept // 60 * 3, "one text tells the width"


def test_a_vector_that_is_not_finite_is_refused(tmp_path):
    with pytest.raises(ValueError, match="not finite"):
        build_vectors(corpus_of(tmp_path, ["a"]), lambda texts: np.array([[np.nan]]), tmp_path, "float32")


@pytest.mark.parametrize("block", [3, 7, 1 << 14])
@pytest.mark.parametrize("depth", [1, 4, 40, 100])
def test_the_nearest_are_those_of_a_full_sort(monkeypatch, block, depth):
    monkeypatch.setattr(dense_index, "SEARCHED", block)
    # whole numbers: sums are exact, and many scores are equal
    vectors = np.random.default_rng(0).integers(-2, 3, (40, WIDTH)).astype(np.float16)
    queries = [query("a", 3), query("bb", 0, 39)]
    search = DenseSearch(vectors, lambda texts: np.round(fake_encode(texts) * 2), "cpu")
    encoded = search.encode([query.text for query in queries])
    for found, vector, asked in zip(search.search(queries, depth), encoded, queries, strict=True):
        scores = vectors.astype(np.float32) @ vector
        order = sorted(range(40), key=lambda row: (-scores[row], row))[:depth]
        assert found.rows.tolist() == order
        assert found.scores.tolist() == scores[order].tolist()
        assert found.positive_scores.tolist() == scores[asked.positives].tolist()


def test_scores_below_zero_are_in_order_and_keep_their_value():
    vectors = np.array([[-1.5], [-0.25], [0.0], [-3.0], [2.0]], np.float32)
    found = DenseSearch(vectors, lambda texts: np.ones((1, 1), np.float32), "cpu").search([query("a", 0)], 5)[0]
    assert found.rows.tolist() == [4, 2, 1, 0, 3]
    assert found.scores.tolist() == [2, 0, -0.25, -1.5, -3]
