"""Filters of Haystack and LlamaIndex as `where`, against what their stores in memory find for the same metadata."""

from datetime import datetime
from pathlib import Path

import numpy as np
import pytest
from mining_samples import write_jsonl
from page_blocks import blocks

from rag_retrieval.data.corpus import build_corpus
from rag_retrieval.data.documents import Document as Row
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.filters import FilterError, Filters
from rag_retrieval.retrieval.index import Index, build_index

VALUES = {
    "year": [2019, 2020, 2021, 2021.5, -3, None],
    "language": ["en", "zh", "中文", "EN", "", None],
    "open": [True, False, None],
    "date": ["2024-03-31", "2024-04-01", "2025-01-01", None],
    "author.name": ["李白", "杜甫", None],
}


def random_rows(count: int) -> list[dict]:
    """Of every field one of its values, or nothing; "author.name" inside an object, or the object is missing."""
    generator, rows = np.random.default_rng(0), []
    for _ in range(count):
        row = {
            field: values[generator.integers(len(values))]
            for field, values in VALUES.items()
            if generator.random() < 0.8
        }
        if "author.name" in row:
            row["author"] = {"name": row.pop("author.name")}
        rows.append(row)
    return rows


ROWS = random_rows(120)
LISTS = [
    {"tags": ["猫", "狗"], "n": 1}, {"tags": [], "n": [2]}, {"tags": ["猫"], "mixed": 1}, {"mixed": "1"},
    {"tags": None},
    {"empty": "", "many": [""], "nulls": [None, 1]}, {"empty": "a", "many": "", "author": {"name": "x"}, "a.b": 1},
    {"parts": [{"page": 3}], "empty": None}, {"parts": {"page": 4}, "author": "y"}, {"tags": ["狗", "鸟"]},
]  # fmt: skip


def filters_of(folder, rows) -> Filters:
    folder.mkdir()
    return Filters(build_corpus([Row(f"{n}", "text", row, f"row {n}") for n, row in enumerate(rows)], folder))


@pytest.fixture(scope="module")
def documents(tmp_path_factory) -> Filters:
    return filters_of(tmp_path_factory.mktemp("plain") / "corpus", ROWS)


@pytest.fixture(scope="module")
def lists(tmp_path_factory) -> Filters:
    return filters_of(tmp_path_factory.mktemp("lists") / "corpus", LISTS)


@pytest.fixture(scope="module")
def index(tmp_path_factory) -> Index:
    root = tmp_path_factory.mktemp("index")
    rows = [{"_id": f"{n}", "text": f"cat {n}", "metadata": row} for n, row in enumerate(ROWS)]
    return build_index(write_jsonl(root / "rows.jsonl", rows), root / "index", IndexOptions())


def found(documents: Filters, where) -> list[int]:
    rows = documents.rows(where)
    return list(range(len(documents.documents))) if rows is None else rows.tolist()


# ---- Haystack


@pytest.fixture(scope="module")
def haystack():
    pytest.importorskip("haystack")
    from rag_retrieval.integrations import haystack

    return haystack


def haystack_store(rows):
    from haystack import Document
    from haystack.document_stores.in_memory import InMemoryDocumentStore

    store = InMemoryDocumentStore()
    store.write_documents([Document(id=f"{n}", content=f"cat {n}", meta=row) for n, row in enumerate(rows)])
    return store


@pytest.fixture(scope="module")
def store(haystack):
    return haystack_store(ROWS)


def haystack_finds(store, filters) -> list[int]:
    return sorted(int(document.id) for document in store.filter_documents(filters))


def random_haystack_filter(generator, depth: int) -> dict:
    if depth and generator.random() < 0.6:
        members = [random_haystack_filter(generator, depth - 1) for _ in range(generator.integers(1, 4))]
        return {"operator": ["AND", "OR", "NOT"][generator.integers(3)], "conditions": members}
    field = list(VALUES)[generator.integers(len(VALUES))]
    ordered = ("==", "!=", "in", "not in", ">", ">=", "<", "<=")
    operator = ordered[generator.integers(8 if field in ("year", "date") else 4)]
    values = VALUES[field] if operator in ordered[:4] else VALUES[field][:-1]
    some = [values[place] for place in generator.integers(len(values), size=generator.integers(0, 4))]
    value = some if "in" in operator else values[generator.integers(len(values))]
    return {"field": field if field == "year" else f"meta.{field}", "operator": operator, "value": value}


def test_random_filters_of_haystack_find_what_its_store_does(haystack, documents, store):
    generator, checked = np.random.default_rng(1), 0
    for _ in range(300):
        filters = random_haystack_filter(generator, 3)
        expected = haystack_finds(store, filters)
        assert found(documents, haystack.where_of(filters, documents)) == expected, filters
        checked += 0 < len(expected) < len(ROWS)
    assert checked > 150


def haystack_filter(field, operator, value) -> dict:
    return {"field": field, "operator": operator, "value": value}


@pytest.mark.parametrize(
    "dates, filters",
    [
        (["2024-03-31", "2024-04-01", "no date"], haystack_filter("meta.date", "==", "2024-03-31")),
        (["2024-03-31", "2024-04-01", "no date"], haystack_filter("meta.date", "!=", "no date")),
        (["2024-03-31T10:00:00+02:00", "2024-04-01T00:30:00+02:00"],
         haystack_filter("meta.date", ">", "2024-03-31T23:00:00+02:00")),
        (["2024-03-31T10:00:00", "2024-04-01T00:30:00"], haystack_filter("meta.date", "<=", datetime(2024, 3, 31, 10))),
        (["2024-03-31T10:00:00", "2024-03-31T10:00", "soon"], haystack_filter("meta.date", "!=", "soon")),
        (["2024-03-31T10:00:00", "soon"], haystack_filter("meta.date", "in", ["soon", datetime(2024, 3, 30, 10)])),
    ],
)  # fmt: skip
def test_dates_that_are_written_alike_are_compared_as_haystack_does(haystack, dates, filters, tmp_path):
    rows = [{"date": date} for date in dates]
    expected = haystack_finds(haystack_store(rows), filters)
    assert 0 < len(expected) < len(rows)
    documents = filters_of(tmp_path / "corpus", rows)
    assert found(documents, haystack.where_of(filters, documents)) == expected


@pytest.mark.parametrize(
    "dates, operator, value",
    [
        (["2024-03-31T00:00:00"], "==", "2024-03-31"),  # equal for Haystack
        (["2024-03-31T00:00:00"], "not in", ["2024-03-31"]),
        (["2024-03-31", "2024-03-31 00:00"], "!=", "2024-03-31"),
        (["2024-03-31T00:00:00"], "<=", "2024-03-31"),
        (["2024-03-31T00:00:00+01:00"], ">", "2024-03-31T00:00:00+02:00"),
        (["2024-03-31T24:00:00"], "==", "2024-03-31T24:00:00"),
        (["2024-03-31T00:00:00"], "==", datetime(2024, 3, 31, microsecond=5)),
        (["a", "b"], ">", "a"),  # an error of Haystack's
        (["2024-03-31", "soon"], ">", "2024-03-30"),  # too
        (["Mar 31 2024"], ">", "Mar 30 2024"),
    ],
)
def test_dates_that_are_written_unlike_are_refused(haystack, dates, operator, value, tmp_path):
    documents = filters_of(tmp_path / "corpus", [{"date": date} for date in dates])
    with pytest.raises(FilterError, match=f"filters: meta.date {operator}: Haystack compares strings as dates"):
        haystack.where_of(haystack_filter("meta.date", operator, value), documents)


@pytest.mark.parametrize(
    "filters, message",
    [
        (haystack_filter("meta.tags", "==", "猫"), "meta.tags ==: documents have a list there"),
        (haystack_filter("meta.n", "in", [1, 2]), "meta.n in: documents have a list there"),
        (haystack_filter("meta.tags", "==", ["猫"]), "meta.tags ==: where: tags.in"),
        (haystack_filter("meta.mixed", "!=", 1), "meta.mixed !=: documents have values of several kinds there"),
        (
            haystack_filter("meta.parts.page", "==", 3),
            "meta.parts.page ==: documents have an object or a list of other",
        ),
        (haystack_filter("meta.author", "==", "y"), "meta.author ==: documents have an object"),
        (haystack_filter("meta.a.b", "==", 1), "meta.a.b ==: documents have an object"),
        (haystack_filter("author.name", "==", "x"), "author.name ==: where compares metadata alone"),
        (haystack_filter("content", "==", "x"), "content ==: where compares metadata alone"),
        (haystack_filter("meta.$or", "==", "x"), r"meta.\$or ==: where cannot name such a field"),
        (haystack_filter("meta.emtpy", "==", "x"), "meta.emtpy ==: where: emtpy: no document has a value there"),
        (haystack_filter("meta.empty", "==", 3), "meta.empty ==: where: empty: expected a string"),
        (haystack_filter("meta.empty", "==", {"ne": "a"}), r"meta.empty ==: where: empty.in\[0\]: expected"),
        (haystack_filter("meta.empty", "in", "a"), "meta.empty in: where: empty.in: expected a list"),
        (haystack_filter("meta.empty", ">", None), "meta.empty >: where: empty.gt: expected a number or a string"),
        (haystack_filter("meta.empty", "like", "a"), "meta.empty like: expected an operator of ==, !=, "),
        ({"field": "meta.empty", "operator": "=="}, "meta.empty ==: expected an operator of .* and a value"),
        ({"operator": "XOR", "conditions": [haystack_filter("meta.n", "==", 1)]}, "expected field, .* AND, OR, NOT"),
        ({"operator": "AND", "conditions": []}, "expected field, operator and value"),
        ({"meta.empty": "a"}, "expected field, operator and value"),
        (["a"], "expected an object"),
    ],
)
def test_what_where_cannot_say_of_haystack_is_named(haystack, lists, filters, message):
    with pytest.raises(FilterError, match=f"filters: {message}"):
        haystack.where_of(filters, lists)


def test_the_retriever_of_haystack_takes_filters_as_haystacks_own_do(haystack, index, store):
    from haystack import Pipeline
    from haystack.components.retrievers.in_memory import InMemoryBM25Retriever
    from haystack.document_stores.types import FilterPolicy

    own, other = haystack_filter("meta.year", ">=", 2020), haystack_filter("meta.language", "!=", "en")
    for policy in FilterPolicy:
        theirs = InMemoryBM25Retriever(store, own, 120, filter_policy=policy)
        ours = haystack.IndexRetriever(index.folder, 120, filters=own, filter_policy=policy)
        pipeline = Pipeline()
        pipeline.add_component("ours", ours)
        again = Pipeline.loads(pipeline.dumps(), allowed_modules=["rag_retrieval.*"]).get_component("ours")
        assert again.to_dict() == ours.to_dict() and again.filter_policy is policy
        for filters in (None, other):
            expected = {document.id for document in theirs.run("cat", filters)["documents"]}
            assert 0 < len(expected) < 120
            for each in (ours, again):
                assert {one.id for one in each.run("cat", filters=filters)["documents"]} == expected
    both = haystack.IndexRetriever(index, 120, where={"open": True}, filters=own).run("cat")["documents"]
    expected = [n for n in haystack_finds(store, own) if ROWS[n].get("open") is True]
    assert sorted(int(one.id) for one in both) == expected and expected
    assert len(haystack.IndexRetriever(index, 120, filters={}).run("cat")["documents"]) == 120


def test_the_filters_of_the_page_run_as_they_stand_there(haystack, llama, index, tmp_path, monkeypatch):
    page = (Path(__file__).resolve().parents[2] / "docs" / "other_software.md").read_text(encoding="utf-8")
    _, block = blocks(page.partition("### Their filters")[2])[0]
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "index").symlink_to(index.folder)
    monkeypatch.chdir(tmp_path)
    for library, names, code in zip((haystack, llama), ({}, vars(llama)), block.split("\n\n"), strict=True):
        exec(code, {**names, "IndexRetriever": library.IndexRetriever})


# ---- LlamaIndex


@pytest.fixture(scope="module")
def llama():
    pytest.importorskip("llama_index.core")
    from rag_retrieval.integrations import llama_index

    return llama_index


def llama_filter(key, operator, value=None):
    from llama_index.core.vector_stores import MetadataFilter

    return MetadataFilter(key=key, operator=operator, value=value)


def llama_filters(filters, condition="and"):
    from llama_index.core.vector_stores import MetadataFilters

    return MetadataFilters(filters=filters, condition=condition)


def llama_finds(rows, filters) -> set[int]:
    """By the function of SimpleVectorStore, which knows no groups in groups."""
    from llama_index.core.vector_stores import MetadataFilters
    from llama_index.core.vector_stores.utils import build_metadata_filter_fn

    if any(isinstance(one, MetadataFilters) for one in filters.filters):
        members = [llama_finds(rows, one if isinstance(one, MetadataFilters) else llama_filters([one]))
                   for one in filters.filters]  # fmt: skip
        everything, union = set(range(len(rows))), set().union(*members)
        return {"and": everything.intersection(*members), "or": union, "not": everything - union}[filters.condition]
    holds = build_metadata_filter_fn(lambda node_id: rows[int(node_id)], filters)
    return {n for n in range(len(rows)) if holds(str(n))}


def random_llama_filters(generator, depth: int):
    members = []
    for _ in range(generator.integers(1, 4)):
        if depth and generator.random() < 0.4:
            members.append(random_llama_filters(generator, depth - 1))
            continue
        field = ("year", "language", "date")[generator.integers(3)]
        operator = ("==", "!=", "in", "nin", ">", ">=", "<", "<=", "is_empty")[generator.integers(9)]
        values = VALUES[field][:4] if field != "date" else VALUES[field][:-1]  # a list holds whole numbers or others
        some = [values[place] for place in generator.integers(3, size=generator.integers(0, 4))]
        value = some if "in" in operator else values[generator.integers(len(values))]
        members.append(llama_filter(field, operator, None if operator == "is_empty" else value))
    return llama_filters(members, ["and", "or", "not"][generator.integers(3)])


def test_random_filters_of_llama_index_find_what_its_store_does(llama, documents):
    generator, checked = np.random.default_rng(2), 0
    for _ in range(300):
        filters = random_llama_filters(generator, 2)
        expected = llama_finds(ROWS, filters)
        assert found(documents, llama.where_of(filters, documents)) == sorted(expected), filters
        checked += 0 < len(expected) < len(ROWS)
    assert checked > 150


@pytest.mark.parametrize(
    "operator, field, value",
    [
        ("contains", "tags", "猫"),
        ("any", "tags", ["狗", "鸟"]),
        ("any", "tags", []),
        ("all", "tags", ["猫", "狗"]),
        ("is_empty", "tags", None),
        ("is_empty", "empty", None),
        ("!=", "empty", "a"),
    ],
)
def test_lists_and_empty_fields_are_found_as_llama_index_does(llama, lists, operator, field, value):
    filters = llama_filters([llama_filter(field, operator, value)])
    expected = llama_finds(LISTS, filters)
    assert len(expected) < len(LISTS) and (expected or value == [])
    assert found(lists, llama.where_of(filters, lists)) == sorted(expected)


@pytest.mark.parametrize(
    "filters, message",
    [
        (("tags", "==", "猫"), "tags ==: documents have a list there"),
        (("n", "contains", 1), "n contains: documents have one value there"),
        (("nulls", "contains", 1), "nulls contains: documents have an object or a list of other"),
        (("many", "is_empty"), "many is_empty: documents have a list there"),
        (("mixed", "==", 1), "mixed ==: documents have values of several kinds there"),
        (("a.b", "==", 1), "a.b ==: where reads a name with a point as a field inside an object"),
        (("$and", "==", 1), r"\$and ==: where cannot name such a field"),
        (("empty", "text_match", "a"), "empty text_match: where has no such operator; expected one of ==, "),
        (("empty", "text_match_insensitive", "a"), "empty text_match_insensitive: where has no such operator"),
        (("empty", "==", None), "empty ==: expected a value, found none; is_empty is for"),
        (("empty", "in", "ab"), "empty in: where: empty.in: expected a list"),
        (("tags", "all", []), "tags all: expected a list of values"),
        (("tags", "all", "猫"), "tags all: expected a list of values"),
        (("tags", "any", "猫"), "tags any: where: tags.in: expected a list"),
        (("emtpy", "==", "a"), "emtpy ==: where: emtpy: no document has a value there"),
        (("empty", ">", 3), "empty >: where: empty: expected a string"),
    ],
)
def test_what_where_cannot_say_of_llama_index_is_named(llama, lists, filters, message):
    with pytest.raises(FilterError, match=f"filters: {message}"):
        llama.where_of(llama_filters([llama_filter(*filters)]), lists)


def test_the_retriever_of_llama_index_takes_filters_beside_where(llama, index, documents):
    import asyncio

    filters = llama_filters(
        [llama_filter("year", ">=", 2020), llama_filters([llama_filter("language", "nin", ["en"])], "not")]
    )
    expected = llama_finds(ROWS, filters) & {n for n, row in enumerate(ROWS) if row.get("open") is True}
    retriever = llama.IndexRetriever(index, 120, {"open": True}, filters=filters)
    for nodes in (retriever.retrieve("cat"), asyncio.run(retriever.aretrieve("cat"))):
        assert {int(node.node.node_id) for node in nodes} == expected and expected
    assert len(llama.IndexRetriever(index, 120, filters=llama_filters([])).retrieve("cat")) == 120
    with pytest.raises(FilterError, match="expected at least one filter in each group"):
        llama.where_of(llama_filters([llama_filters([])]), documents)
