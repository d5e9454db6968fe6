"""Scores by lexical weights and token vectors against hand arithmetic, and pooling against sentence-transformers."""

import numpy as np
import pytest
import torch
from sentence_transformers.multi_vector_encoder.modules import HierarchicalTokenPooling

from rag_retrieval.models.matching import dense_scores, lexical_score, maxsim, pool_token_vectors
from rag_retrieval.models.vectors import similarity


def unit_vectors(count: int, width: int = 8, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).normal(size=(count, width)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


@pytest.mark.parametrize("kind", ["cosine", "dot", "euclidean", "manhattan"])
def test_dense_scores_are_the_diagonal_of_the_similarities(kind):
    queries, documents = 3 * unit_vectors(5), 2 * unit_vectors(5, seed=1)
    documents[2] = 0
    found = dense_scores(queries, documents, kind)
    np.testing.assert_allclose(found, np.diag(similarity(queries, documents, kind)), atol=1e-5)
    assert found.dtype == np.float32


def test_a_lexical_score_is_the_sum_over_common_tokens():
    query, document = {"panda": 0.5, "bear": 0.25, "eats": 1.0}, {"bear": 2.0, "panda": 0.5, "grass": 9.0, "a": 1.0}
    assert lexical_score(query, document) == lexical_score(document, query) == 0.5 * 0.5 + 0.25 * 2.0
    assert lexical_score({}, document) == lexical_score({3: 1.0}, {4: 1.0}) == 0


def test_maxsim_takes_the_best_document_token_of_each_query_token():
    query = np.array([[1, 0], [0, 1], [0.6, 0.8]], np.float32)
    document = np.array([[0.8, 0.6], [-1, 0]], np.float32)
    best = [0.8, 0.6, 0.6 * 0.8 + 0.8 * 0.6]
    assert maxsim(query, document) == pytest.approx(sum(best))
    assert maxsim(query, document, mean=True) == pytest.approx(sum(best) / 3)
    assert maxsim(query.astype(np.float16), document) == pytest.approx(sum(best), abs=2e-3)
    assert maxsim(query[:1], document[1:]) == -1  # the best of one
    assert maxsim(query[:0], document, mean=True) == maxsim(query, document[:0]) == 0


@pytest.mark.parametrize("tokens,factor,protected", [(30, 2, 0), (31, 2, 1), (17, 1.5, 1), (9, 20, 1), (5, 3, 0)])
def test_pooled_token_vectors_are_those_of_sentence_transformers(tokens, factor, protected):
    vectors = unit_vectors(tokens)
    expected = HierarchicalTokenPooling(factor, num_protected_tokens=protected).pool_one(torch.tensor(vectors)).numpy()
    found = pool_token_vectors(vectors, factor, protected)
    assert len(found) == protected + max(int((tokens - protected) // factor), 1)
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert found.dtype == np.float32


def test_vectors_of_one_direction_become_one_and_few_stay():
    first, second = unit_vectors(2)
    found = pool_token_vectors(np.stack([first, second, first, second]), 2)
    assert found.shape == (2, 8)
    np.testing.assert_allclose(sorted(found.tolist()), sorted([first.tolist(), second.tolist()]), atol=1e-6)
    for few in (unit_vectors(0), unit_vectors(1)):
        np.testing.assert_array_equal(pool_token_vectors(few, 4, 1), few)
    np.testing.assert_array_equal(pool_token_vectors(unit_vectors(7), 1), unit_vectors(7))
