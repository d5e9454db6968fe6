"""What is searched and what is relevant, from a BEIR folder and from ranking records."""

import pytest
from beir_samples import write, write_toy
from training_runs import write_jsonl

from rag_retrieval.data.collection import beir_collection, is_beir_folder, store_collection
from rag_retrieval.data.records import DataError, RecordRules
from rag_retrieval.data.store import open_store


@pytest.fixture
def collection(tmp_path):
    def make(records):
        path = write_jsonl(tmp_path / "val.jsonl", records)
        return store_collection(open_store(path, RecordRules(for_embedder=True), group_by_query=True), path)

    return make


def by_text(collection, qrels=None) -> dict[str, dict[str, float]]:
    return {
        collection.queries[query]: {collection.documents[document]: grade for document, grade in grades.items()}
        for query, grades in (qrels or collection.qrels).items()
    }


def test_every_query_of_records_is_asked_of_the_documents_of_all(collection):
    made = collection([{"query": "a", "pos": ["one"], "neg": ["two"]}, {"query": "b", "pos": ["three", "two"]}])
    assert list(made.documents.values()) == ["one", "two", "three"]
    assert by_text(made) == {"a": {"one": 1, "two": 0}, "b": {"three": 1, "two": 1}}
    assert made.pool is None and made.relevance == made.qrels


def test_equal_texts_of_records_are_one_query_and_one_document(collection):
    made = collection(
        [
            {"query": "a b", "pos": ["one"], "neg": ["ｔｗｏ"]},
            {"query": "c", "pos": ["two "]},
            {"query": "a  b", "pos": ["two"], "neg": ["one"]},
        ]
    )
    assert list(made.queries.values()) == ["a b", "c"] and list(made.documents.values()) == ["one", "ｔｗｏ"]
    assert by_text(made) == {"a b": {"one": 1, "ｔｗｏ": 1}, "c": {"ｔｗｏ": 1}}, "the highest grade"


def test_ids_of_records_rise_with_their_place_in_the_file(collection):
    made = collection([{"query": f"q{place}", "pos": [f"d{place}"]} for place in range(12)])
    ids = [document.encode() for document in made.documents]
    assert ids == sorted(ids) and list(made.documents.values()) == [f"d{place}" for place in range(12)]


def test_one_query_with_two_prompts_is_two_queries(collection):
    records = [{"query": "a", "pos": ["one"]}, {"query": "a", "pos": ["two"], "prompt": "say: "}]
    made = collection(records)
    assert list(made.queries.values()) == ["a", "a"] and list(made.prompts.values()) == ["say: "]
    assert made.queries.keys() & made.prompts.keys() == {list(made.queries)[1]}


def test_relevant_is_what_training_calls_a_positive_and_grades_stay(collection):
    """Whatever the labels of other queries: above the lowest of the query's own, or in pos."""
    records = [
        {"query": "a", "hits": [{"content": name, "label": label} for name, label in (("one", 0.1), ("two", 0.3))]},
        {"query": "b", "pos": ["one"], "neg": ["three"], "pos_scores": [-2], "neg_scores": [-1]},
        {"query": "c", "content": "one", "label": 9},
        {"query": "c", "content": "two", "label": 5},
        {"query": "d", "hits": [{"content": "one", "label": 0}, {"content": "two", "label": 0}]},
    ]
    made = collection(records)
    labels = {"a": {"one": 0.1, "two": 0.3}, "b": {"one": -2, "three": -1}, "c": {"one": 9, "two": 5}}
    assert by_text(made) == {query: pytest.approx(grades) for query, grades in labels.items()} | {
        "d": {"one": 0, "two": 0}
    }
    assert by_text(made, made.relevance) == {
        "a": {"one": 0, "two": 1},
        "b": {"one": 1, "three": 0},
        "c": {"one": 1, "two": 0},
        "d": {"one": 0, "two": 0},
    }
    assert [made.queries[query] for query in made.without_relevant] == ["d"]


def test_a_beir_split_has_its_own_queries_and_the_whole_corpus_by_id(tmp_path):
    assert not is_beir_folder(tmp_path)
    made = beir_collection(write_toy(tmp_path), "test")
    assert is_beir_folder(tmp_path)
    assert list(made.queries) == list(made.qrels) == ["q8", "q9", "q10", "q11"]
    assert len(made.documents) == 72 and list(made.documents) == sorted(made.documents)
    assert made.without_relevant == made.not_in_corpus == []


def test_a_beir_pool_and_relevant_documents_outside_of_the_corpus(tmp_path):
    folder = write_toy(tmp_path)
    write(folder / "qrels/dev.tsv", "q1\td1-0\t1\nq1\tgone\t2\nq1\tlost\t0\nq2\td2-0\t0\n")
    write(folder / "candidates.dev.tsv", "q1\td1-0\nq1\td1-1\n")
    made = beir_collection(folder, "dev")
    assert made.pool == {"q1": ["d1-0", "d1-1"]}
    assert made.not_in_corpus == ["gone"] and made.without_relevant == ["q2"]
    with pytest.raises(DataError, match="nowhere"):
        beir_collection(folder, "nowhere")
