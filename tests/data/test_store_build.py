"""A built store has the records of its source, also where pairs are grouped by query."""

import json
import random

import numpy as np
import pytest
from record_samples import groups_of, hits, pairs_of, pointwise, random_records, write

from rag_retrieval.data import store_build
from rag_retrieval.data.records import DataError, RecordRules, positives
from rag_retrieval.data.store import open_store
from rag_retrieval.data.summary import summary


@pytest.fixture(autouse=True)
def _cache_dir(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_RETRIEVAL_CACHE", str(tmp_path / "cache"))


def slow_groups(path, group_by_query):
    """The groups by plain dicts and lists: (query, documents, labels, positives, lines)."""
    groups, of_query = [], {}
    for line, text in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        data = json.loads(text)
        if "hits" in data:
            documents = [hit["content"] for hit in data["hits"]]
            labels = [hit["label"] for hit in data["hits"]]
        elif "pos" in data:
            documents = data["pos"] + data["neg"]
            labels = data.get("pos_scores", [1] * len(data["pos"]))
            labels = labels + data.get("neg_scores", [0] * len(data["neg"]))
        else:
            documents, labels = [data["content"]], [data["label"]]
        labels = [float(np.float32(label)) for label in labels]
        earlier = of_query.get(data["query"]) if "content" in data and group_by_query else None
        if earlier is not None:
            earlier[1].extend(documents)
            earlier[2].extend(labels)
            earlier[4].append(line)
            continue
        in_pos = [True] + [False] * (len(documents) - 1) if "pos" in data else None
        group = (data["query"], documents, labels, in_pos, [line] * len(documents))
        groups.append(group)
        if "content" in data:
            of_query[data["query"]] = group
    return [(q, d, x, in_pos or positives(x), lines) for q, d, x, in_pos, lines in groups]


@pytest.mark.parametrize("group_by_query", [False, True])
@pytest.mark.parametrize("chunk", [3, 1 << 13])
def test_random_access_equals_the_source_for_every_record(tmp_path, monkeypatch, group_by_query, chunk):
    monkeypatch.setattr(store_build, "CHUNK", chunk)
    path = write(tmp_path / "a.jsonl", random_records(seed=1, count=400))
    store = open_store(path, group_by_query=group_by_query)
    expected = slow_groups(path, group_by_query)
    assert groups_of(store) == [(q, d, x, p, lines[0]) for q, d, x, p, lines in expected]
    pairs = [(q, *row) for q, d, x, _, lines in expected for row in zip(d, x, lines, strict=True)]
    order = list(range(len(pairs)))
    random.Random(2).shuffle(order)
    assert [tuple(store.pair(index)) for index in order] == [pairs[index] for index in order]


def test_labels_stay_exact_float32(tmp_path):
    store = open_store(write(tmp_path / "a.jsonl", pointwise(("q", "d", 0.99988), ("q", "e", 1e-30))))
    assert store.labels.tolist() == [16775203 / 2**24, float(np.float32(1e-30))]
    assert store.pair(0).label == 16775203 / 2**24


def test_pointwise_records_are_groups_of_one_unless_grouped(tmp_path):
    path = write(tmp_path / "a.jsonl", pointwise(("q", "d", 1), ("q", "e", 0)))
    assert groups_of(open_store(path)) == [("q", ["d"], [1], [True], 1), ("q", ["e"], [0], [False], 2)]


def test_scattered_pairs_of_a_query_form_one_group(tmp_path):
    first = pointwise(("b", "b1", 0.2), ("a", "a1", 0), ("b", "b2", 0.9))
    later = pointwise(("c", "c1", 1), ("a", "a2", 0), ("b", "b3", 0.2))
    store = open_store(write(tmp_path / "a.jsonl", first + later), group_by_query=True)
    low, high = float(np.float32(0.2)), float(np.float32(0.9))
    assert groups_of(store) == [
        ("b", ["b1", "b2", "b3"], [low, high, low], [False, True, False], 1),
        ("a", ["a1", "a2"], [0, 0], [False, False], 2),
        ("c", ["c1"], [1], [True], 4),
    ]
    assert [pair[3] for pair in pairs_of(store)] == [1, 3, 6, 2, 5, 4]


def test_hits_and_pos_neg_records_keep_their_group_when_pairs_are_grouped(tmp_path):
    records = [
        *pointwise(("q", "d1", 1)),
        hits("q", 1, 0),
        {"query": "q", "pos": ["p"]},
        *pointwise(("q", "d2", 0)),
    ]
    store = open_store(write(tmp_path / "a.jsonl", records), group_by_query=True)
    assert [group[1] for group in groups_of(store)] == [["d1", "d2"], ["q0", "q1"], ["p"]]


def test_grouped_records_give_one_pair_per_document(tmp_path):
    records = [hits("a", 2, 0), {"query": "b", "pos": ["p"], "neg": ["n"], "pos_scores": [0.5], "neg_scores": [0.25]}]
    store = open_store(write(tmp_path / "a.jsonl", records))
    assert pairs_of(store) == [("a", "a0", 2, 1), ("a", "a1", 0, 1), ("b", "p", 0.5, 2), ("b", "n", 0.25, 2)]


def test_documents_that_are_all_empty_can_be_stored(tmp_path):
    path = write(tmp_path / "a.jsonl", pointwise(("a", "", 1), ("b", "", 0), ("a", "", 0)))
    assert pairs_of(open_store(path)) == [("a", "", 1, 1), ("b", "", 0, 2), ("a", "", 0, 3)]
    grouped = open_store(path, group_by_query=True)
    assert pairs_of(grouped) == [("a", "", 1, 1), ("a", "", 0, 3), ("b", "", 0, 2)]


def test_a_group_without_exactly_one_positive_is_reported_with_its_line(tmp_path):
    triples = [("a", "1", 1), ("b", "1", 0), ("a", "2", 0), ("b", "2", 0), ("c", "1", 1), ("c", "2", 0.5)]
    triples += [("d", "1", 2), ("d", "2", 0)]
    path = write(tmp_path / "a.jsonl", pointwise(*triples))
    with pytest.raises(DataError) as caught:
        open_store(path, RecordRules(exactly_one_positive=True), group_by_query=True)
    expected = "expected exactly one 1 and the rest 0 for listwise cross entropy."
    assert str(caught.value).splitlines() == [
        f"{path}:2: the pairs of this query have the labels 0, 0; {expected}",
        f"{path}:5: the pairs of this query have the labels 1, 0.5; {expected}",
        f"{path}:7: the pairs of this query have the labels 2, 0; {expected}",
    ]


def test_more_than_twenty_groups_without_exactly_one_positive_are_counted(tmp_path, monkeypatch):
    monkeypatch.setattr(store_build, "CHUNK", 4)
    path = write(tmp_path / "a.jsonl", pointwise(*((f"q{i}", "d", 0) for i in range(23))))
    with pytest.raises(DataError) as caught:
        open_store(path, RecordRules(exactly_one_positive=True), group_by_query=True)
    lines = str(caught.value).splitlines()
    assert [line.split(":")[1] for line in lines[:20]] == [str(i) for i in range(1, 21)]
    assert lines[20:] == ["... and 3 more bad lines"]


# ---- triples


def triples(path, *rows):
    path.write_text("".join("\t".join(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.mark.parametrize("chunk", [1, 1 << 13])
def test_triples_of_a_query_form_one_group_with_each_document_once(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(store_build, "CHUNK", chunk)
    rows = [("a", "p", "n1"), ("a", "p", "n2"), ("b", "q", "m"), ("a", "p2", "n1"), ("a", "p", "n3")]
    path = triples(tmp_path / "a.tsv", *rows)
    store = open_store(path, group_by_query=True)
    assert groups_of(store) == [
        ("a", ["p", "n1", "n2", "p2", "n3"], [1, 0, 0, 1, 0], [True, False, False, True, False], 1),
        ("b", ["q", "m"], [1, 0], [True, False], 3),
    ]
    assert [pair[3] for pair in pairs_of(store)] == [1, 1, 2, 4, 5, 3, 3]
    assert store.group(0).lines.tolist() == [1, 1, 2, 4, 5]
    counts = summary(store)
    assert (counts.records, counts.queries, counts.pairs, counts.repeated_pairs) == (5, 2, 7, 3)


def test_a_document_that_is_positive_and_negative_counts_as_positive(tmp_path):
    path = triples(tmp_path / "a.tsv", ("a", "p", "x"), ("b", "x", "y"), ("a", "x", "p"))
    groups = groups_of(open_store(path, group_by_query=True))
    assert groups == [("a", ["p", "x"], [1, 1], [True, True], 1), ("b", ["x", "y"], [1, 0], [True, False], 2)]


def test_triples_equal_the_same_groups_written_as_pos_and_neg(tmp_path):
    rng = random.Random(7)
    rows = [(f"q{rng.randrange(9)}", f"p{rng.randrange(3)}", f"n{rng.randrange(20)}") for _ in range(200)]
    of_query = {}
    for query, positive, negative in rows:
        pos, neg = of_query.setdefault(query, ([], []))
        pos += [] if positive in pos else [positive]
        neg += [] if negative in neg else [negative]
    records = [{"query": query, "pos": pos, "neg": neg} for query, (pos, neg) in of_query.items()]
    grouped = open_store(triples(tmp_path / "a.tsv", *rows), group_by_query=True)
    expected = open_store(write(tmp_path / "a.jsonl", records))
    as_sets = [
        [(query, sorted(zip(d, x, p, strict=True))) for query, d, x, p, _ in groups_of(store)]
        for store in (grouped, expected)
    ]
    assert as_sets[0] == as_sets[1]


def test_pairs_and_triples_of_one_query_stay_apart_and_repeated_pairs_stay(tmp_path):
    records = [
        *pointwise(("q", "d", 1), ("q", "d", 1)),
        {"query": "q", "positive": "d", "negative": "e"},
        {"query": "q", "positive": "d", "negative": "f"},
    ]
    store = open_store(write(tmp_path / "a.jsonl", records), group_by_query=True)
    assert [group[1] for group in groups_of(store)] == [["d", "d"], ["d", "e", "f"]]


def test_without_grouping_each_triple_is_a_group(tmp_path):
    path = triples(tmp_path / "a.tsv", ("a", "p", "n1"), ("a", "p", "n2"))
    assert [group[1] for group in groups_of(open_store(path))] == [["p", "n1"], ["p", "n2"]]


def test_each_document_of_a_merged_group_has_its_own_line(tmp_path):
    path = write(tmp_path / "a.jsonl", pointwise(("a", "1", 1), ("b", "2", 0), ("a", "3", 0)))
    store = open_store(path, group_by_query=True)
    assert [store.group(index).lines.tolist() for index in range(2)] == [[1, 3], [2]]


# Ids of texts


def test_equal_texts_after_normalization_have_one_id(tmp_path):
    records = pointwise(("ｑ  a", "e\u0301 b", 1), ("q a\n", "\u00e9\tb ", 1), ("Q a", "é b c", 1))
    store = open_store(write(tmp_path / "a.jsonl", records), RecordRules(for_embedder=True))
    first, second, third = store.query_ids
    assert first == second != third
    first, second, third = store.document_ids
    assert first == second != third


@pytest.mark.parametrize("chunk", [1, 1 << 13])
def test_ids_and_prompts_go_where_their_records_go(tmp_path, monkeypatch, chunk):
    monkeypatch.setattr(store_build, "CHUNK", chunk)
    records = pointwise(("b", "x", 1), ("a", "y", 1), ("b", "y", 0), ("a", "z", 0), ("c", "x", 1))
    store = open_store(write(tmp_path / "a.jsonl", records), RecordRules(for_embedder=True), group_by_query=True)
    assert [store.query(group) for group in range(3)] == ["b", "a", "c"]
    x, y, y_again, z, x_again = store.document_ids
    assert x == x_again and y == y_again and len({x, y, z}) == 3
    alone = open_store(write(tmp_path / "b.jsonl", records), RecordRules(for_embedder=True))
    assert store.query_ids.tolist() == alone.query_ids[[0, 1, 4]].tolist()
    assert [store.prompts[group] for group in range(3)] == [""] * 3
    assert store.query_text_ids.tolist() == store.query_ids.tolist()


def test_a_store_has_ids_only_where_they_are_asked_for(tmp_path):
    path = write(tmp_path / "a.jsonl", pointwise(("a", "x", 1)))
    names = {file.name for file in open_store(path).files}
    assert names == {file.name for file in open_store(path, RecordRules(for_embedder=True)).files} - {
        "query_id", "query_text_id", "document_id", "prompt", "prompt.offsets"
    }  # fmt: skip
