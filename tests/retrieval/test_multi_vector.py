"""Token vectors in shards, MaxSim over them, candidates by centroids, against loops over every document."""

import numpy as np
import pytest

from rag_retrieval.models.matching import maxsim as maxsim_of_pair
from rag_retrieval.models.vectors import finish
from rag_retrieval.retrieval import token_vectors
from rag_retrieval.retrieval.encoding import Encoded
from rag_retrieval.retrieval.inverted_lists import write_lists
from rag_retrieval.retrieval.multi_vector import CentroidSearch, MultiVectorSearch
from rag_retrieval.retrieval.stored_vectors import NumberCodec, append_vectors
from rag_retrieval.retrieval.token_codec import nearest_centroids
from rag_retrieval.retrieval.token_vectors import StoredTokens, TokenVectors, maxsim

NONE = np.zeros(0, np.int64)


def texts_of(seed, counts, width=8):
    generator = np.random.default_rng(seed)
    return [finish(generator.normal(size=(count, width))) for count in counts]


DOCUMENTS = texts_of(0, [3, 1, 0, 7, 40, 2, 5, 5, 0, 9, 4, 6, 1, 1, 30])
QUERIES = texts_of(1, [4, 1, 12])
ENCODED = Encoded(None, None, TokenVectors.of(QUERIES))


def written(folder, documents, size=4, centroids=None):
    shards = []
    for start in range(0, len(documents), size):
        shards.append(folder / f"shard-{len(shards):06d}")
        shards[-1].mkdir()
        block = documents[start : start + size]
        for half in (block[:1], block[1:]):
            if half:
                append_vectors(shards[-1] / "tokens.npy", np.concatenate(half))
                append_vectors(shards[-1] / "token_counts.npy", np.array(list(map(len, half)), np.int32))
        if centroids is not None:
            codes = [np.unique(nearest_centroids(text, centroids, "cpu")) for text in block]
            counts = np.array(list(map(len, codes)))
            write_lists(shards[-1], "token_lists", np.concatenate(codes), counts, None)
    return shards


@pytest.fixture
def stored(tmp_path):
    return StoredTokens(written(tmp_path, DOCUMENTS), NumberCodec("float32"))


def slow_scores(query):
    return np.array([maxsim_of_pair(query, document) for document in DOCUMENTS], np.float32)


def best(scores, depth):
    return sorted(range(len(scores)), key=lambda row: (-round(float(scores[row]), 5), row))[:depth]


def test_maxsim_by_hand():
    queries = TokenVectors.of([np.eye(2, dtype=np.float32), np.array([[0.6, 0.8]], np.float32)])
    documents = TokenVectors.of([np.array([[1, 0], [0.5, 0.25]], np.float32), np.array([[-1, -1]], np.float32)])
    # 1 + .25; -1 - 1; .6; -1.4
    np.testing.assert_allclose(maxsim(queries, documents), [[1.25, -2], [0.6, -1.4]], rtol=1e-6)


def test_vectors_of_documents_come_back_by_rows_and_in_blocks(stored, monkeypatch):
    assert len(stored) == 15 and isinstance(stored.vectors.parts[0], np.memmap)
    rows = np.array([14, 2, 0, 14, 4])
    back = stored.rows(rows)
    assert back.counts.tolist() == [30, 0, 3, 30, 40]
    np.testing.assert_array_equal(back.vectors, np.concatenate([DOCUMENTS[row] for row in rows]))
    for block in (1, 10, 1000):
        monkeypatch.setattr(token_vectors, "BLOCK", block)
        blocks = list(stored.blocks())
        np.testing.assert_array_equal(np.concatenate([one.vectors for one in blocks]), np.concatenate(DOCUMENTS))
        assert np.concatenate([one.counts for one in blocks]).tolist() == list(map(len, DOCUMENTS))
        assert all(one.counts.sum() <= block or len(one.counts) == 1 for one in blocks)


@pytest.mark.parametrize("block, asked", [(1, 1), (16, 5), (1 << 14, 1 << 10)])
def test_all_documents_are_searched_as_by_a_loop_over_pairs(stored, monkeypatch, block, asked):
    monkeypatch.setattr(token_vectors, "BLOCK", block)
    monkeypatch.setattr(token_vectors, "ASKED", asked)
    search = MultiVectorSearch(stored, lambda names: ENCODED, "cpu")
    judged = [np.array([2, 0]), NONE, np.arange(15)]
    for found, query, asked_for in zip(search.search(["q"] * 3, judged, 6), QUERIES, judged, strict=True):
        scores = slow_scores(query)
        assert found.rows.tolist() == best(scores, 6)
        np.testing.assert_allclose(found.scores, scores[found.rows], rtol=1e-5)
        np.testing.assert_allclose(found.judged_scores, scores[asked_for], rtol=1e-5, atol=1e-6)
    assert search.is_exact and search.recall(0) == 1


class First:
    """Another search, which finds the rows in this order."""

    def __init__(self, rows):
        self.rows, self.depths = np.array(rows), []

    def search_encoded(self, queries, judged, depth, among):
        self.depths.append(depth)
        return [self] * len(judged)

    def search_documents(self, rows, depth):
        return self.search_encoded(None, rows, depth, None)


def test_candidates_of_another_search_are_scored_and_no_others(stored):
    first = First([9, 4, 13, 2])
    search = MultiVectorSearch(stored, lambda names: ENCODED, "cpu", first, factor=4)
    for found, query in zip(search.search(["q"] * 3, [NONE, np.array([3]), NONE], 3), QUERIES, strict=True):
        scores = slow_scores(query)
        expected = [row for row in best(scores, 15) if row in first.rows][:3]
        assert found.rows.tolist() == expected
        np.testing.assert_allclose(found.scores, scores[expected], rtol=1e-5)
    assert first.depths == [12] and not search.is_exact


def test_recall_is_the_part_of_the_best_documents_that_the_candidates_hold(stored):
    first = First(range(5))
    measured = MultiVectorSearch(stored, None, "cpu", first).recall(0)
    parts = []
    for row, document in enumerate(DOCUMENTS):
        nearest = [other for other in best(slow_scores(document[:32]), 11) if other != row]
        parts.append((sum(other < 5 for other in nearest), len(nearest)))
    found, total = map(sum, zip(*parts, strict=True))
    assert measured == pytest.approx(found / total, abs=0.02) and found < total  # equal scores of texts without tokens


def test_centroids_give_each_document_the_best_of_those_that_a_token_probes(tmp_path, monkeypatch):
    monkeypatch.setattr("rag_retrieval.retrieval.multi_vector.PROBES", 2)
    centroids = texts_of(2, [6])[0]
    search = CentroidSearch(centroids, written(tmp_path, DOCUMENTS, centroids=centroids))
    for query in QUERIES:
        products = query @ centroids.T
        expected = {}
        for row, document in enumerate(DOCUMENTS):
            codes = set(nearest_centroids(document, centroids, "cpu").tolist()) if len(document) else set()
            score, is_found = 0.0, False
            for of_token in products:
                near = [code for code in np.argsort(-of_token)[:2].tolist() if code in codes]
                score += max((float(of_token[code]) for code in near), default=0.0)
                is_found |= bool(near)
            if is_found:
                expected[row] = score
        order = sorted(expected, key=lambda row: (-round(expected[row], 5), row))
        assert search.search(query, 50).tolist() == order and search.search(query, 3).tolist() == order[:3]


def test_documents_found_by_centroids_are_scored_by_their_own_vectors(tmp_path):
    centroids = texts_of(2, [6])[0]
    shards = written(tmp_path, DOCUMENTS, centroids=centroids)
    first = CentroidSearch(centroids, shards)
    stored = StoredTokens(shards, NumberCodec("float32"))
    search = MultiVectorSearch(stored, lambda names: ENCODED, "cpu", first, factor=2)
    for found, query in zip(search.search(["q"] * 3, [NONE] * 3, 3), QUERIES, strict=True):
        candidates, scores = first.search(query, 6), slow_scores(query)
        assert found.rows.tolist() == [row for row in best(scores, 15) if row in candidates][:3]


def test_the_first_document_is_known_by_its_vectors(stored):
    search = MultiVectorSearch(stored, None, "cpu")
    assert search.similarity_of_first(TokenVectors.of(DOCUMENTS[:1])) == pytest.approx(1)
    assert search.similarity_of_first(TokenVectors.of([-DOCUMENTS[0]])) == pytest.approx(-1)
    assert search.similarity_of_first(TokenVectors.of(DOCUMENTS[3:4])) == 0
