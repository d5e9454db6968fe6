"""Conditions on metadata: by hand, and against a loop over every document, in every search of an index."""

import asyncio
import json
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from index_samples import ALL, QUERIES, corpus_file, documents, m3_folder
from mining_samples import write_jsonl

from rag_retrieval import Retriever
from rag_retrieval.cli import main
from rag_retrieval.data.corpus import build_corpus
from rag_retrieval.data.documents import Document
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.filters import LIST, ONE, OTHER, Filters, parse_where
from rag_retrieval.retrieval.index import Index, build_index

pytest.importorskip("bm25s")

HAND = [
    {"year": 2019, "language": "zh", "tags": ["猫", "狗"], "author": {"name": "李白", "born": 701}, "open": True},
    {"year": 2020, "language": "en", "tags": ["猫"], "date": "2020-03-01", "open": False},
    {"year": 2021.5, "language": None, "tags": [], "date": "2020-11-30", "parts": [{"page": 3}, {"page": 9}]},
    {},
    {"year": [2019, 2024], "language": "EN", "author": {"name": "李白"}, "author.name": "杜甫", "mixed": 1},
    {"mixed": "1", "nothing": None},
    {"mixed": True, "parts": {"page": 4}},
]


def filters_of(folder, rows):
    folder.mkdir()
    return Filters(build_corpus([Document(f"d{n}", "text", row, f"row {n}") for n, row in enumerate(rows)], folder))


@pytest.fixture(scope="module")
def hand(tmp_path_factory):
    return filters_of(tmp_path_factory.mktemp("hand") / "corpus", HAND)


@pytest.mark.parametrize(
    "where, rows",
    [
        ({"year": 2019}, [0, 4]),
        ({"year": 2020.0}, [1]),
        ({"year": {"gte": 2020, "lt": 2022}}, [1, 2]),
        ({"year": {"gt": 2020}}, [2, 4]),
        ({"year": {"lte": 2019}}, [0, 4]),
        ({"year": {"gt": 2019, "lt": 2024}}, [1, 2]),  # one element of a list keeps all bounds
        ({"language": "en"}, [1]),
        ({"language": {"in": ["zh", "EN"]}}, [0, 4]),
        ({"language": {"in": []}}, []),
        ({"language": {"in": ["fr"]}}, []),
        ({"language": "fr"}, []),
        ({"language": None}, [2, 3, 5, 6]),
        ({"language": {"ne": None}}, [0, 1, 4]),
        ({"language": {"ne": "zh"}}, [1, 2, 3, 4, 5, 6]),
        ({"language": {"in": ["zh", None]}}, [0, 2, 3, 5, 6]),
        ({"tags": "猫"}, [0, 1]),
        ({"tags": {"ne": "狗"}}, [1, 2, 3, 4, 5, 6]),
        ({"tags": None}, [2, 3, 4, 5, 6]),
        ({"date": {"gte": "2020-04"}}, [2]),
        ({"date": {"gte": "2020-01-01", "lt": "2020-04-01"}}, [1]),
        ({"author.name": "李白"}, [0, 4]),
        ({"author.name": "杜甫"}, [4]),
        ({"author.born": {"lt": 800}}, [0]),
        ({"parts.page": {"gt": 3, "lt": 9}}, [6]),
        ({"parts.page": 9}, [2]),
        ({"open": True}, [0]),
        ({"open": {"ne": True}}, [1, 2, 3, 4, 5, 6]),
        ({"mixed": 1}, [4]),
        ({"mixed": "1"}, [5]),
        ({"mixed": True}, [6]),
        ({"mixed": {"in": [True, 1]}}, [4, 6]),
        ({"year": {"gte": 2019, "ne": 2024}, "language": "zh"}, [0]),
        ({"year": {"in": [2020, 2024], "gt": 2020}}, [4]),
        ({"year": {"gt": 3000}}, []),
        ({"$or": [{"year": 2020}, {"language": "zh"}]}, [0, 1]),
        ({"$or": [{"year": 2019, "language": "zh"}, {"mixed": "1"}]}, [0, 5]),
        ({"$or": [{"year": 2019}, {"mixed": 1}], "language": "EN"}, [4]),
        ({"$and": [{"tags": "猫"}, {"tags": "狗"}]}, [0]),
        ({"$not": {"language": {"in": ["zh", "en"]}}}, [2, 3, 4, 5, 6]),
        ({"$not": {"year": {"gte": 2020}}}, [0, 3, 5, 6]),
        ({"$not": {"year": 2019, "language": "zh"}}, [1, 2, 3, 4, 5, 6]),
        ({"$not": {"$or": [{"year": 2019}, {"$not": {"language": None}}]}}, [2, 3, 5, 6]),
    ],
)
def test_conditions_hold_for_the_documents_that_they_say(hand, where, rows):
    assert hand.rows(where).tolist() == rows


def test_no_condition_is_all_documents(hand):
    assert hand.rows(None) is None and hand.rows({}) is None


def nested(where, levels):
    return {"$not": nested(where, levels - 1)} if levels else where


def test_groups_stand_in_each_other(hand):
    assert hand.rows(nested({"year": 2020}, 20)).tolist() == [1]
    assert hand.rows({"$or": [{"year": year} for year in range(1000, 1255)] + [{"year": 2020}]}).tolist() == [1]


def test_a_column_knows_what_documents_have_there(tmp_path):
    rows = [
        {"a": 1, "b": [1, 2], "c": [], "d": [None], "e": [[1]], "f": {"g": 1, "h": {"i": [2], "j": None}}, "k": None},
        {"a": None, "b": 3, "d": 4, "e": 5, "f": [{"g": 2}], "c": [1], "k": 1, "l.m": 1, "n": {"o.p": 1}, "l.q": [1]},
        {"f": {"g": [1]}},
    ]  # fmt: skip
    filters = filters_of(tmp_path / "corpus", rows)
    expected = {
        "a": {ONE}, "b": {LIST, ONE}, "c": {LIST}, "d": {OTHER, ONE}, "e": {OTHER, ONE}, "f.g": {ONE, OTHER, LIST},
        "f.h.i": {LIST}, "k": {ONE}, "l.m": {OTHER}, "n.o.p": {OTHER}, "l.q": {OTHER},
    }  # fmt: skip
    assert {field: filters.column(field).shapes for field in expected} == expected


@pytest.mark.parametrize(
    "where, message",
    [
        (["year"], "where: expected an object"),
        ({3: 4}, "where: expected an object"),
        ({"year": [2019]}, r"where: year: expected a string, a number, .*\{\"in\": .*found \[2019\]"),
        ({"year": {}}, "where: year: expected operators among gt, gte, lt, lte, in, ne, found none"),
        ({"author": {"name": "李白"}}, "where: author: expected operators .* found \"name\"; .* written author.NAME"),
        ({"year": {"gte": None}}, "where: year.gte: expected a number or a string, found null"),
        ({"year": {"gte": True}}, "where: year.gte: expected a number or a string, found true"),
        ({"year": {"gte": 2019, "lt": "2020"}}, "where: year: expected bounds of one kind"),
        ({"year": {"in": "2019"}}, "where: year.in: expected a list of values, found \"2019\""),
        ({"year": {"in": [2019, [3]]}}, r"where: year.in\[1\]: expected a string, a number"),
        ({"year": {"ne": [3]}}, "where: year.ne: expected a string, a number"),
        ({"year": float("nan")}, "where: year: expected a string, a number, .*found NaN"),
        ({"yaer": 2019}, "where: yaer: no document has a value there; the fields are year, .*author.name"),
        ({"nothing": 1}, "where: nothing: no document has a value there; the fields are "),
        ({"author": "李白"}, "where: author: no document has a value there; the fields are .*author.name"),
        ({"year": "2019"}, "where: year: expected a number, as the documents have there, such as 2019; found \"2019\""),
        ({"date": {"gt": 2020}}, "where: date: expected a string, .* such as \"2020-03-01\"; found 2020"),
        ({"language": {"in": ["zh", 3]}}, "where: language: expected a string, .*; found 3"),
        ({"$or": {"year": 2019}}, r"where: \$or: expected a list of objects such as .*, found {\"year\": 2019}"),
        ({"$and": []}, r"where: \$and: expected a list of objects"),
        ({"$or": [{"year": 2019}, {}]}, r"where: \$or\[1\]: expected at least one condition, found none"),
        ({"$or": [{"year": 2019}, 3]}, r"where: \$or\[1\]: expected an object such as .* found 3"),
        ({"$not": [{"year": 2019}]}, r"where: \$not: expected an object"),
        ({"$not": {}}, r"where: \$not: expected at least one condition"),
        ({"$or": [{"year": 2019}, {"year": {"above": 2}}]}, r"where: \$or\[1\].year: expected operators among"),
        ({"$not": {"yaer": 2019}}, "where: yaer: no document has a value there"),
        ({"$or": [{"year": "2019"}]}, "where: year: expected a number"),
        ({"$or": [{"year": 2019}] * 257}, "where: at most 256 conditions are taken"),
        (nested({"year": 2019}, 21), r"where: at most 20 of \$and, \$or and \$not are taken in each other"),
        ({"open": {"ne": 0}}, "where: open: expected true or false, .* such as false; found 0"),
    ],
)  # fmt: skip
def test_a_mistake_is_named_with_its_field(hand, where, message):
    with pytest.raises(ValueError, match=message):
        hand.rows(where)


def test_documents_without_metadata_are_said(tmp_path):
    with pytest.raises(ValueError, match="where: year: no document has a value there; none of the documents has meta"):
        filters_of(tmp_path / "corpus", [{}, {}]).rows({"year": 2020})


# ---- against a loop over every document


def slow_values(metadata, field):
    """All that a field may be, by asking every beginning of its name."""
    if isinstance(metadata, list):
        return [value for one in metadata for value in slow_values(one, field)]
    if field == "":
        return [] if metadata is None or isinstance(metadata, dict) else [metadata]
    found = []
    if isinstance(metadata, dict):
        for name, value in metadata.items():
            if field == name or field.startswith(name + "."):
                found += slow_values(value, field[len(name) + 1 :])
    return found


def is_same(one, other):
    return isinstance(one, bool) == isinstance(other, bool) and one == other


def are_alike(one, other):
    return len({"text" if isinstance(value, str) else isinstance(value, bool) for value in (one, other)}) == 1


def slow_holds(metadata, where):
    kept = {"gt": lambda a, b: a > b, "gte": lambda a, b: a >= b, "lt": lambda a, b: a < b, "lte": lambda a, b: a <= b}
    for field, asked in where.items():
        if field.startswith("$"):
            members = [slow_holds(metadata, member) for member in ([asked] if field == "$not" else asked)]
            if not {"$or": any(members), "$and": all(members), "$not": not members[0]}[field]:
                return False
            continue
        values = slow_values(metadata, field)

        def has(one, values=values):
            return not values if one is None else any(is_same(value, one) for value in values)

        if not isinstance(asked, dict):
            if not has(asked):
                return False
            continue
        bounds = {name: bound for name, bound in asked.items() if name in kept}
        if bounds and not any(all(are_alike(v, b) and kept[name](v, b) for name, b in bounds.items()) for v in values):
            return False
        if "in" in asked and not any(map(has, asked["in"])) or "ne" in asked and has(asked["ne"]):
            return False
    return True


VALUES = [0, 1, -2, 2.5, 1.0, True, False, "", "a", "b", "ab", "中", "2020-01-02", None]


def random_metadata(generator, depth=2):
    def value(depth):
        kind = generator.random()
        if kind < 0.15 and depth:
            return [value(depth - 1) for _ in range(generator.integers(0, 3))]
        if kind < 0.25 and depth:
            return random_metadata(generator, depth - 1)
        return VALUES[generator.integers(len(VALUES))]

    return {name: value(depth) for name in ("a", "b", "a.b", "c") if generator.random() < 0.7}


def random_condition(generator):
    one = VALUES[generator.integers(len(VALUES))]
    if generator.random() < 0.3:
        return one
    bounds = [0, 1, 2.5, -1] if generator.random() < 0.5 else ["a", "b", "中", "2020"]
    condition = {name: bounds[generator.integers(4)] for name in ("gt", "gte", "lt", "lte") if generator.random() < 0.3}
    if generator.random() < 0.3:
        condition["in"] = [VALUES[place] for place in generator.integers(len(VALUES), size=generator.integers(0, 4))]
    if generator.random() < 0.3 or not condition:
        condition["ne"] = one
    return condition


def test_random_conditions_hold_as_a_loop_over_documents_says(tmp_path):
    generator = np.random.default_rng(0)
    rows = [random_metadata(generator) for _ in range(300)]
    filters, checked = filters_of(tmp_path / "corpus", rows), 0
    for _ in range(600):
        fields = generator.choice(["a", "b", "c", "a.b", "b.a", "a.a.b"], generator.integers(1, 3), replace=False)
        where = {field: random_condition(generator) for field in fields.tolist()}
        if generator.random() < 0.5:
            members = [{field: random_condition(generator)} for field in ("a", "b", "c")]
            members[0] |= {"$not": where}
            where = {("$and", "$or")[generator.integers(2)]: members, "c": random_condition(generator)}
        expected = [row for row, metadata in enumerate(rows) if slow_holds(metadata, where)]
        assert filters.rows(where).tolist() == expected, where
        checked += 0 < len(expected) < 300
    assert checked > 200


def test_documents_are_read_once_for_a_field_that_is_there_and_not_again_for_one_that_is_not(tmp_path):
    filters = filters_of(tmp_path / "corpus", [{"a": 1, "b": None, "c": {"d": 2}}])
    blocks, read = [], filters.documents.metadata_blocks
    filters.documents.metadata_blocks = lambda size: blocks.append(size) or read(size)
    for where, passes in (({"a": 1, "x": 1}, 1), ({"a": 1}, 1), ({"y": 1}, 1), ({"b": 1}, 2), ({"b": 1}, 2),
                          ({"c": 1}, 3), ({"c": 1}, 3), ({"c.d": 2}, 4), ({"c.d": 2, "a": 1}, 4)):  # fmt: skip
        try:
            assert filters.rows(where).tolist() == [0]
        except ValueError as error:
            assert "the fields are" in str(error)
        assert len(blocks) == passes, where


def test_threads_read_a_column_once(tmp_path):
    filters = filters_of(tmp_path / "corpus", [{"a": n % 7, "b": str(n % 5)} for n in range(1000)])
    asked = [{"a": n % 7, "b": str(n % 5)} if n % 3 else {"a": {"lt": n % 7}} for n in range(200)]
    blocks, read = [], filters.documents.metadata_blocks
    filters.documents.metadata_blocks = lambda size: blocks.append(size) or read(size)
    with ThreadPoolExecutor(16) as threads:
        found = list(threads.map(filters.rows, asked))
    assert len(blocks) <= 2
    for where, rows in zip(asked, found, strict=True):
        assert rows.tolist() == [n for n in range(1000) if slow_holds({"a": n % 7, "b": str(n % 5)}, where)]


# ---- in every search


def with_years():
    return [row | {"metadata": row.get("metadata", {}) | {"year": 1990 + n}} for n, row in enumerate(documents())]


WHERES = [{"year": {"gte": 1995, "lt": 2015}}, {"year": {"in": [1990, 1999, 2027]}}, {"animal": "panda"}, {"year": 1}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return m3_folder(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_file(tmp_path_factory.mktemp("corpus") / "c.jsonl", with_years())


@pytest.fixture(scope="module")
def built(model, corpus, tmp_path_factory):
    options = IndexOptions(
        embedder=model, representations=ALL, device="cpu", shard_size=10, vector_precision="float32",
        token_precision="float32", token_candidates="all",
    )  # fmt: skip
    return build_index(corpus, tmp_path_factory.mktemp("index") / "index", options).folder


@pytest.mark.parametrize("where", WHERES)
def test_every_stage_searches_among_the_documents_that_match(built, where):
    index = Index(built, device="cpu")
    fit = [row for row in range(len(index)) if slow_holds(index.documents.metadata(row), where)]
    whole = Retriever(index, stages=["bm25", *ALL]).search_stages(QUERIES, depth=len(index))
    found = Retriever(index, stages=["bm25", *ALL]).search_stages(QUERIES, depth=5, where=where)
    for lists, of_all in zip(found, whole, strict=True):
        for stage in ("bm25", *ALL):
            expected = [row for row in of_all[stage].rows.tolist() if row in fit][:5]
            assert lists[stage].rows.tolist() == expected
            scores = dict(zip(of_all[stage].rows.tolist(), of_all[stage].scores.tolist(), strict=True))
            np.testing.assert_allclose(lists[stage].scores, [scores[row] for row in expected], rtol=1e-5)
        assert len(lists["dense"].rows) == len(lists["multi_vector"].rows) == min(5, len(fit))
        assert set(lists["fused"].rows.tolist()) <= set(fit)


@pytest.mark.parametrize("candidates", ["dense", "lexical", "tokens"])
def test_token_vectors_find_as_many_as_match_whatever_the_candidates(candidates, model, corpus, tmp_path):
    options = IndexOptions(
        embedder=model, representations=ALL, bm25=False, device="cpu", shard_size=10, token_precision="float32",
        token_candidates=candidates, rescore_factor=2,
    )  # fmt: skip
    index = build_index(corpus, tmp_path / "index", options)
    among = index.opened.filters.rows({"year": {"gte": 1995, "lt": 2020}})
    encoded, none = index.represent_queries(QUERIES), [np.zeros(0, np.int64)] * len(QUERIES)
    search = index.searches["multi_vector"]
    assert not search.is_exact and len(among) == 25
    for depth in (3, 13, 25):
        found = search.search_encoded(encoded, none, depth, among)
        exact = search.search_encoded(encoded, none, 25, among)  # scores all 25
        for one, all_of_them in zip(found, exact, strict=True):
            assert len(one.rows) == depth and set(one.rows.tolist()) <= set(among.tolist())
            if 2 * depth >= 25:
                assert one.rows.tolist() == all_of_them.rows[:depth].tolist()


def test_all_ways_of_asking_filter_alike(built, capsys):
    with Retriever(built, device="cpu") as retriever:
        where = {"year": {"gte": 2000}, "animal": {"ne": "panda"}}
        one = retriever.search(QUERIES[0], 4, where)
        assert len(one) == 4 and all(slow_holds(result.metadata, where) for result in one)
        many = retriever.search_many(QUERIES, 4, where=where)
        assert [result.doc_id for result in many[0]] == [result.doc_id for result in one]
        assert asyncio.run(retriever.asearch(QUERIES[0], 4, where)) == one
        assert len(retriever.search(QUERIES[0], 4, {"year": 1})) == 0
        with pytest.raises(ValueError, match="where: yeer: no document has a value there; the fields are year, animal"):
            retriever.search(QUERIES[0], where={"yeer": 3})
    command = ["search", "--index", str(built), "--query", QUERIES[0], "--device", "cpu", "--output_format", "json"]
    assert main([*command, "--top_k", "4", "--where", json.dumps(where)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(one.to_json())
    for wrong, message in (
        ("{year: 3}", "--where: expected JSON such as"),
        ('{"year": [3]}', "--where: year: expected a string, a number"),
        ('{"year": 3, "year": 4}', "found the key 'year' twice"),
        ('{"yeer": 3}', "where: yeer: no document has a value there"),
    ):
        assert main([*command, "--where", wrong]) == 2
        error = capsys.readouterr().err
        assert error.startswith("error: ") and message in error and error.count("\n") == 1


def test_an_index_that_changed_filters_by_what_it_has_now(built, tmp_path):
    rows = [{"_id": "a", "text": "water", "year": 1}, {"_id": "b", "text": "hot water", "year": 2}]
    index = build_index(write_jsonl(tmp_path / "c.jsonl", rows), tmp_path / "index", IndexOptions())
    retriever = Retriever(index)
    assert [one.doc_id for one in retriever.search("water", where={"year": 2})] == ["b"]
    index.add(write_jsonl(tmp_path / "d.jsonl", [{"_id": "c", "text": "water", "year": 2, "language": "en"}]))
    assert {one.doc_id for one in retriever.search("water", where={"year": 2})} == {"b", "c"}
    assert [one.doc_id for one in retriever.search("water", where={"language": "en"})] == ["c"]


def test_the_form_of_conditions_is_checked_without_documents():
    assert [condition.field for condition in parse_where({"a": 1, "b": {"in": [None, 2]}})] == ["a", "b"]
