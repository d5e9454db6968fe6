"""The search by lexical weights against sums of dicts, by hand and over every document."""

import numpy as np
import pytest

from rag_retrieval.retrieval.encoding import Encoded
from rag_retrieval.retrieval.inverted_lists import InvertedLists, Weights, write_lists
from rag_retrieval.retrieval.lexical import LexicalSearch

NONE = np.zeros(0, np.int64)


def weights_of(texts: list[dict[int, float]]) -> Weights:
    ids = [sorted(text) for text in texts]
    values = [text[id_] for text, of_text in zip(texts, ids, strict=True) for id_ in of_text]
    return Weights(
        np.array([id_ for of_text in ids for id_ in of_text], np.int64),
        np.array(values, np.float32),
        np.array(list(map(len, ids)), np.int64),
    )


def written(folder, documents, size=3):
    """Shards of so many documents."""
    shards = []
    for start in range(0, len(documents), size):
        shards.append(folder / f"shard-{len(shards):06d}")
        shards[-1].mkdir()
        weights = weights_of(documents[start : start + size])
        write_lists(shards[-1], "lexical", weights.ids, weights.counts, weights.weights)
    return shards


HAND = [{7: 0.5, 250_000: 1.0}, {}, {7: 2.0}, {3: 1.0, 9: 0.25}, {9: 4.0, 7: 0.5}]


def test_a_document_has_the_sum_of_the_products_of_common_terms(tmp_path):
    search = LexicalSearch(written(tmp_path, HAND), represent=None)
    queries = weights_of([{7: 2.0, 9: 1.0}, {250_000: 3.0, 8: 9.0}, {8: 1.0}, {}])
    first, second, *others = search.search_weights(queries, [np.array([1, 3, 4]), np.array([0, 2]), NONE, NONE], 3)
    # 7: 2 x .5, 2 x 2, 2 x .5 + 1 x 4; 9: 1 x .25
    assert first.rows.tolist() == [4, 2, 0] and first.scores.tolist() == [5, 4, 1]
    assert first.judged_scores.tolist() == [0, 0.25, 5]
    assert second.rows.tolist() == [0] and second.scores.tolist() == [3] and second.judged_scores.tolist() == [3, 0]
    assert [len(one.rows) for one in others] == [0, 0], "what has no common term is not found"


@pytest.mark.parametrize("size", [1, 7, 50])
def test_shards_of_any_size_find_what_a_loop_over_dicts_finds(tmp_path, size):
    generator = np.random.default_rng(0)
    texts = [
        {int(id_): float(generator.integers(1, 5)) / 4 for id_ in generator.choice(30, generator.integers(0, 9), False)}
        for _ in range(56)
    ]
    documents, queries = texts[:50], texts[50:]
    encoded = Encoded(None, weights_of(queries), None)
    search = LexicalSearch(written(tmp_path, documents, size), represent=lambda names: encoded)
    found = search.search(["q"] * 6, [np.arange(50)] * 6, 8)
    for candidates, query in zip(found, queries, strict=True):
        scores = [sum(weight * document.get(term, 0) for term, weight in query.items()) for document in documents]
        assert candidates.judged_scores.tolist() == scores  # of quarters, so exact in float32
        expected = sorted((row for row in range(50) if scores[row]), key=lambda row: (-scores[row], row))[:8]
        assert candidates.rows.tolist() == expected and candidates.scores.tolist() == [scores[row] for row in expected]
    assert search.entries == sum(map(len, documents))


def test_weights_of_documents_come_back_in_any_order(tmp_path):
    search = LexicalSearch(written(tmp_path, HAND, size=2), represent=None)
    rows = np.array([4, 0, 1, 4, 3])
    back = search.rows(rows)
    texts = [dict(zip(ids.tolist(), weights.tolist(), strict=True)) for ids, weights in back.texts()]
    assert texts == [HAND[row] for row in rows] and back.counts.tolist() == [2, 2, 0, 2, 2]
    assert len(search.rows(NONE).ids) == 0
    found = search.search_documents(np.array([4, 1]), 2)
    assert found[0].rows.tolist() == [4, 2] and found[0].scores.tolist() == [16.25, 1] and len(found[1].rows) == 0


def test_lists_are_mapped_and_hold_four_bytes_a_number(tmp_path):
    (shard,) = written(tmp_path, HAND, size=9)
    lists = InvertedLists(shard, "lexical", has_weights=True)
    assert isinstance(lists.weights, np.memmap) and lists.documents.dtype == np.int32
    assert lists.terms.tolist() == [3, 7, 9, 250_000] and lists.starts.tolist() == [0, 1, 4, 6, 7]
    assert lists.documents.tolist() == [3, 0, 2, 4, 3, 4, 0] and lists.counts.tolist() == [2, 0, 1, 2, 2]


def test_a_shard_without_any_term_is_searched(tmp_path):
    search = LexicalSearch(written(tmp_path, [{}, {}]), represent=None)
    (found,) = search.search_weights(weights_of([{1: 1.0}]), [np.array([1])], 5)
    assert len(found.rows) == 0 and found.judged_scores.tolist() == [0]


def test_the_first_document_is_known_by_its_weights(tmp_path):
    search = LexicalSearch(written(tmp_path, HAND), represent=None)
    assert search.similarity_of_first(weights_of(HAND[:1])) == pytest.approx(1)
    assert search.similarity_of_first(weights_of([{7: 1.0, 8: 2.0}])) == pytest.approx(0.5 / np.sqrt(1.25 * 5))
    assert search.similarity_of_first(weights_of([{}])) == 0
    (tmp_path / "empty").mkdir()
    empty = LexicalSearch(written(tmp_path / "empty", [{}]), represent=None)
    assert empty.similarity_of_first(weights_of([{}])) == 1
