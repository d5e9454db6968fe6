import sys

import numpy as np
import pytest

from rag_retrieval.mining.dense_index import DenseSearch
from rag_retrieval.mining.faiss_index import build_faiss, read_faiss
from rag_retrieval.mining.queries import Query

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
    queries = [Query(str(row), np.array([row]), [1.0]) for row in range(20)]

    def encode(texts):
        return VECTORS[[int(text) for text in texts]].astype(np.float32)

    exact = DenseSearch(VECTORS, encode, "cpu").search(queries, 7)
    for found, expected in zip(DenseSearch(VECTORS, encode, "cpu", index).search(queries, 7), exact, strict=True):
        assert found.rows.tolist() == expected.rows.tolist()
        np.testing.assert_allclose(found.scores, expected.scores, rtol=1e-5)
        np.testing.assert_allclose(found.positive_scores, expected.positive_scores, rtol=1e-5)


def test_an_index_that_faiss_cannot_make_is_told(tmp_path):
    pytest.importorskip("faiss")
    with pytest.raises(ValueError, match="faiss_index 'Flut': FAISS cannot make this index"):
        build_faiss(VECTORS, "Flut", 0, tmp_path)


def test_what_faiss_did_not_fill_is_left_out():
    class Short:
        def search(self, encoded, depth):
            return np.array([[0.5, 0.25, -1]], np.float32), np.array([[7, 2, -1]])

    found = DenseSearch(VECTORS, lambda texts: np.zeros((1, 8), np.float32), "cpu", Short())
    found = found.search([Query("a", np.array([0]), [1.0])], 3)[0]
    assert found.rows.tolist() == [7, 2] and found.scores.tolist() == [0.5, 0.25]
