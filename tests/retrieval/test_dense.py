import sys

import numpy as np
import pytest
from mining_samples import corpus_of

from rag_retrieval.retrieval import dense
from rag_retrieval.retrieval.dense import DenseSearch, build_faiss, build_vectors, open_vectors, read_faiss

WIDTH = 5


def fake_encode(texts):
    """A vector from the text's number: the same for the same text, whatever stands beside it."""
    return np.array(
        [np.random.default_rng(len(text) + 31 * sum(text.encode())).normal(size=WIDTH) for text in texts], "f4"
    )


def test_vectors_are_mapped_and_rounded_to_their_type(tmp_path):
    texts = [f"text {row}" for row in range(10)]
    build_vectors(corpus_of(tmp_path, texts), fake_encode, tmp_path, "float16")
    vectors = open_vectors(tmp_path)
    assert vectors.dtype == np.float16 and isinstance(vectors.base.base, np.memmap)
    np.testing.assert_array_equal(vectors, fake_encode(texts).astype(np.float16))


@pytest.mark.parametrize("kept", [0, 1, 59, 60, 61, 130])
def test_a_stopped_encoding_continues_after_its_last_whole_block(tmp_path, monkeypatch, kept):
    monkeypatch.setattr(dense, "ENCODED", 3)  # 60 bytes
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


def test_candidates_are_the_nearest_and_the_judged_have_their_own_scores():
    vectors = np.random.default_rng(0).integers(-2, 3, (40, WIDTH)).astype(np.float16)
    queries, judged = ["a", "bb"], [np.array([3]), np.array([0, 39])]
    search = DenseSearch(vectors, lambda texts: np.round(fake_encode(texts) * 2), "cpu")
    for found, vector, asked in zip(search.search(queries, judged, 4), search.encode(queries), judged, strict=True):
        scores = vectors.astype(np.float32) @ vector
        assert found.rows.tolist() == sorted(range(40), key=lambda row: (-scores[row], row))[:4]
        assert found.scores.tolist() == scores[found.rows].tolist()
        assert found.judged_scores.tolist() == scores[asked].tolist()


VECTORS = np.random.default_rng(0).normal(size=(500, 8)).astype(np.float16)


def test_without_faiss_the_error_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "faiss", None)
    with pytest.raises(ValueError, match="faiss_index needs FAISS; run: pip install faiss-cpu"):
        build_faiss(VECTORS, "Flat", 0, tmp_path)


@pytest.mark.parametrize("factory", ["Flat", "IVF4,Flat"])
def test_faiss_finds_what_the_exact_search_finds(tmp_path, factory):
    pytest.importorskip("faiss")
    build_faiss(VECTORS, factory, 0, tmp_path)
    index = read_faiss(tmp_path)
    if factory.startswith("IVF"):
        index.nprobe = 4  # all lists
    queries, judged = [str(row) for row in range(20)], [np.array([row]) for row in range(20)]

    def encode(texts):
        return VECTORS[[int(text) for text in texts]].astype(np.float32)

    exact = DenseSearch(VECTORS, encode, "cpu").search(queries, judged, 7)
    by_faiss = DenseSearch(VECTORS, encode, "cpu", index).search(queries, judged, 7)
    for found, expected in zip(by_faiss, exact, strict=True):
        assert found.rows.tolist() == expected.rows.tolist()
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
        np.testing.assert_allclose(found.judged_scores, expected.judged_scores, rtol=1e-5)


def test_an_index_that_faiss_cannot_make_is_refused(tmp_path):
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="faiss_index 'Flut': FAISS cannot make this index"):
        build_faiss(VECTORS, "Flut", 0, tmp_path)


def test_what_faiss_did_not_fill_is_left_out():
    class Short:
        def search(self, encoded, depth):
            return np.array([[0.5, 0.25, -1]], np.float32), np.array([[7, 2, -1]])

    found = DenseSearch(VECTORS, lambda texts: np.zeros((1, 8), np.float32), "cpu", Short())
    found = found.search(["a"], [np.array([0])], 3)[0]
    assert found.rows.tolist() == [7, 2] and found.scores.tolist() == [0.5, 0.25]
