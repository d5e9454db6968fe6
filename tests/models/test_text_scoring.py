"""Distinct texts, chunks, and work one item ahead."""

import threading

from rag_retrieval.models import text_scoring
from rag_retrieval.models.text_scoring import chunks_of, distinct, prefetch, score_texts


def test_every_distinct_pair_is_scored_once_in_the_order_of_its_first_place():
    seen = []

    def score(chunk):
        seen.append(list(chunk))
        return [query + document for query, document in chunk]

    pairs = [("a", "1"), ("b", "1"), ("a", "1"), ("c", "2"), ("b", "1"), ("d", "3")]
    assert score_texts(pairs, list, score, chunk_texts=3) == ["a1", "b1", "a1", "c2", "b1", "d3"]
    assert seen == [[("a", "1"), ("b", "1"), ("c", "2")], [("d", "3")]]
    assert score_texts([], list, score) == []


def test_distinct_items_and_the_place_of_each():
    assert distinct("abacb") == (["a", "b", "c"], [0, 1, 0, 2, 1])


def test_a_chunk_is_bounded_by_pairs_and_by_the_characters_of_its_documents(monkeypatch):
    monkeypatch.setattr(text_scoring, "CHUNK_CHARACTERS", 10)
    pairs = [("q", "d" * length) for length in (4, 6, 1, 30, 1, 1, 1, 1)]
    chunks = [[len(document) for _, document in chunk] for chunk in chunks_of(pairs, 3)]
    assert chunks == [[4, 6], [1], [30], [1, 1, 1], [1]]
    assert list(chunks_of([], 3)) == []


def test_prefetch_keeps_the_order_and_works_on_one_item_while_another_is_used():
    second = threading.Event()
    started = []

    def work(item):
        started.append(item)
        if item == 1:
            second.set()
        return item * item

    results = prefetch(work, iter(range(4)))
    assert next(results) == 0
    assert second.wait(timeout=60) and started == [0, 1], "the next one and no more"
    assert list(results) == [1, 4, 9]
    assert list(prefetch(work, [])) == []
