import pytest
from mining_samples import corpus_of, write_beir, write_jsonl

from rag_retrieval.data.records import DataError
from rag_retrieval.mining.queries import read_beir_queries, read_record_queries

TEXTS = ["panda", "tiger", "otter"]
DOCUMENTS = {f"d{row}": text for row, text in enumerate(TEXTS)}


@pytest.fixture
def corpus(tmp_path):
    return corpus_of(tmp_path, TEXTS)


def read_beir(tmp_path, corpus, queries, qrels):
    return read_beir_queries(write_beir(tmp_path / "data", DOCUMENTS, queries, qrels), "train", corpus)


def read_records(tmp_path, corpus, records):
    return read_record_queries(str(write_jsonl(tmp_path / "r.jsonl", records)), corpus)


def content(found):
    return [(query.text, query.positives.tolist(), query.labels) for query in found.queries]


def test_grades_above_zero_are_positives_and_queries_come_by_text(tmp_path, corpus):
    qrels = [("2", "d1", 2), ("1", "d2", 1), ("2", "d0", 0), ("2", "d2", 1)]
    found = read_beir(tmp_path, corpus, {"1": "b", "2": "a", "3": "unjudged"}, qrels)
    assert content(found) == [("a", [1, 2], [2.0, 1.0]), ("b", [2], [1.0])]
    assert found.read == 2


def test_a_query_that_comes_twice_is_merged_with_all_its_positives(tmp_path, corpus):
    qrels = [("1", "d0", 1), ("2", "d1", 2), ("2", "d0", 3), ("1", "d1", 1)]
    found = read_beir(tmp_path, corpus, {"1": "same", "2": "same"}, qrels)
    assert content(found) == [("same", [0, 1], [3.0, 2.0])], "the higher grade"
    assert found.read == 2


def test_records_of_all_formats_give_their_positives(tmp_path, corpus):
    records = [
        {"query": "p", "content": "PANDA", "label": 1},
        {"query": "p", "content": "unknown to the corpus", "label": 0},
        {"query": "h", "hits": [{"content": "tiger", "label": 2}, {"content": "x", "label": 1}]},
        {"query": "n", "pos": ["otter"], "neg": ["y"], "pos_scores": [0.9], "neg_scores": [0.1]},
        {"query": "n", "pos": ["tiger"], "neg": []},
    ]
    found = read_records(tmp_path, corpus, records)
    labels = [("h", [1], [2.0]), ("n", [1, 2], [1.0, pytest.approx(0.9)]), ("p", [0], [1.0])]
    assert content(found) == labels
    assert found.read == 4


def test_the_digest_covers_queries_positives_and_labels_in_any_order(tmp_path, corpus):
    def digest(queries, *qrels):
        return read_beir(tmp_path, corpus, queries, qrels).digest()

    queries = {"1": "a", "2": "b"}
    first = digest(queries, ("1", "d0", 1), ("2", "d1", 1))
    assert first == digest(dict(reversed(queries.items())), ("2", "d1", 1), ("1", "d0", 1))
    others = [
        digest(queries, ("1", "d2", 1), ("2", "d1", 1)),
        digest(queries, ("1", "d0", 2), ("2", "d1", 1)),
        digest({"1": "a", "2": "c"}, ("1", "d0", 1), ("2", "d1", 1)),
        digest(queries, ("1", "d0", 1)),
    ]
    assert len({first, *others}) == 5


def test_the_documents_with_the_id_of_a_query_are_known_with_it(tmp_path, corpus):
    queries = {"d0": "a", "1": "a", "d1": "b", "2": "c"}
    qrels = [("d0", "d2", 1), ("1", "d1", 1), ("d1", "d2", 1), ("2", "d0", 1)]
    found = read_beir(tmp_path, corpus, queries, qrels)
    assert [(query.text, query.identical) for query in found.queries] == [("a", (0,)), ("b", (1,)), ("c", ())]
    others = read_beir(tmp_path, corpus, queries | {"d1": "z"}, qrels)
    assert found.digest() != others.digest()


def test_judged_queries_without_text_are_left_out_and_counted(tmp_path, corpus):
    found = read_beir(tmp_path, corpus, {"1": "a", "2": " ", "3": ""}, [("1", "d0", 1), ("2", "d1", 1)])
    assert (len(found.queries), found.read, found.without_text) == (1, 2, 1)


def test_every_wrong_judgment_is_reported_with_its_line(tmp_path, corpus):
    qrels = [("1", "d9", 1), ("2", "d0", 0), ("2", "d1", 0), ("3", "d0", 1)]
    with pytest.raises(DataError) as caught:
        read_beir(tmp_path, corpus, {"1": "a", "2": "b"}, qrels)
    place = f"{tmp_path}/data/qrels/train.tsv"
    assert str(caught.value).splitlines() == [
        f"{place}:2: the corpus has no document 'd9'; add it, or remove this line.",
        f"{place}:5: queries.jsonl has no query '3'; add it, or remove this line.",
        f"{place}:3: query '2' has no positive (grade above 0); add one, or remove the query.",
    ]


def test_many_wrong_judgments_are_counted(tmp_path, corpus):
    with pytest.raises(DataError, match=r"\.\.\. and 10 more bad lines"):
        read_beir(tmp_path, corpus, {"1": "a"}, [("1", f"x{row}", 1) for row in range(30)])


@pytest.mark.parametrize(
    "line, message",
    [
        ("1\td0", "train.tsv:2: found 2 columns between tabs; expected query-id, corpus-id, score."),
        ("1\td0\thigh", "train.tsv:2: the grade is 'high'; expected a finite number."),
        ("", "train.tsv: found no judgments; expected lines of query-id, corpus-id, score between tabs."),
    ],
)
def test_a_malformed_table_is_refused(tmp_path, corpus, line, message):
    folder = write_beir(tmp_path / "data", DOCUMENTS, {"1": "a"}, [])
    (folder / "qrels/train.tsv").write_text(f"query-id\tcorpus-id\tscore\n{line}\n")
    with pytest.raises(DataError) as caught:
        read_beir_queries(folder, "train", corpus)
    assert str(caught.value).endswith(message)


def test_missing_qrels_say_which_splits_are_there(tmp_path, corpus):
    folder = write_beir(tmp_path / "data", DOCUMENTS, {"1": "a"}, [("1", "d0", 1)])
    with pytest.raises(DataError, match=r"neither qrels/dev.tsv nor .* \(the splits there: train\); set split."):
        read_beir_queries(folder, "dev", corpus)
    (folder / "qrels/train.tsv").unlink()
    with pytest.raises(DataError, match=r"\(there is no qrels file at all\)"):
        read_beir_queries(folder, "train", corpus)


@pytest.mark.parametrize(
    "queries, message",
    [([{"_id": "1", "text": "a"}] * 2, "queries.jsonl:2: the _id '1' was given before; give each query its own.")],
)
def test_a_bad_query_is_reported_with_its_line(tmp_path, corpus, queries, message):
    folder = write_beir(tmp_path / "data", DOCUMENTS, {}, [("1", "d0", 1)])
    write_jsonl(folder / "queries.jsonl", queries)
    with pytest.raises(DataError) as caught:
        read_beir_queries(folder, "train", corpus)
    assert str(caught.value).endswith(message)


def test_records_without_a_known_positive_are_reported(tmp_path, corpus):
    records = [
        {"query": "a", "pos": ["a very long text that no document of the corpus has at all"]},
        {"query": "b", "hits": [{"content": "panda", "label": 0}]},
        {"query": "c", "content": "panda", "label": 1},
        {"query": "c", "content": "no panda", "label": 1},
    ]
    with pytest.raises(DataError) as caught:
        read_records(tmp_path, corpus, records)
    unknown = "'a very long text that no document of the corpus ha'"
    assert str(caught.value).splitlines() == [
        f"{tmp_path}/r.jsonl:1: the corpus has no document with the text of this positive: {unknown}.",
        f"{tmp_path}/r.jsonl:2: the query has no positive; give it one, or remove it.",
        f"{tmp_path}/r.jsonl:4: the corpus has no document with the text of this positive: 'no panda'.",
    ]
