import pytest
from mining_samples import corpus_of, write_jsonl

from rag_retrieval.data.corpus import build_corpus, text_hash
from rag_retrieval.data.documents import Document, read_documents
from rag_retrieval.data.records import DataError


def build(tmp_path, entries):
    folder = tmp_path / "built"
    folder.mkdir()
    return build_corpus(read_documents(write_jsonl(tmp_path / "c.jsonl", entries)), folder)


def test_texts_and_ids_come_back_and_a_title_stands_before_its_text(tmp_path):
    corpus = build(
        tmp_path,
        [
            {"_id": "a", "title": "Panda", "text": "eats bamboo"},
            {"_id": "猫", "text": "猫吃鱼"},
            {"_id": "e", "title": "", "text": ""},
            {"_id": "z", "title": None, "text": "last"},
        ],
    )
    assert [corpus.text(row) for row in range(4)] == ["Panda eats bamboo", "猫吃鱼", "", "last"]
    assert [corpus.id(row) for row in range(4)] == ["a", "猫", "e", "z"]
    assert [corpus.row_of_id(id_) for id_ in ("z", "猫", "e", "b")] == [3, 1, 2, None]


def test_blocks_cover_all_rows_in_order_from_any_start(tmp_path):
    corpus = corpus_of(tmp_path, [f"text {row}" for row in range(10)])
    assert [len(block) for block in corpus.blocks(4)] == [4, 4, 2]
    assert [text for block in corpus.blocks(4, start=8) for text in block] == ["text 8", "text 9"]


def test_texts_are_the_same_whatever_their_case_and_white_space(tmp_path):
    assert text_hash("The  Panda\n eats ") == text_hash("the panda EATS") != text_hash("the pandaeats")
    corpus = corpus_of(tmp_path, ["other", "The  Panda\n eats ", "the panda eats"])
    assert corpus.row_of_text("THE PANDA eats") == 1, "the first of two"
    assert corpus.row_of_text("the panda") is None
    assert corpus.text_hashes[1] == corpus.text_hashes[2] != corpus.text_hashes[0]


def test_ids_with_equal_hashes_are_compared_themselves(tmp_path, monkeypatch):
    monkeypatch.setattr("rag_retrieval.data.corpus._hash", lambda content: len(content))
    corpus = corpus_of(tmp_path, ["one", "two", "three"])
    assert [corpus.row_of_id(id_) for id_ in ("d0", "d1", "d2", "d3")] == [0, 1, 2, None]


def test_repeated_ids_are_refused_with_their_places(tmp_path):
    entries = [{"_id": "a", "text": "x"}, {"_id": "b", "text": "x"}, {"_id": "a", "text": "y"}]
    with pytest.raises(DataError, match="documents 1 and 3 of the corpus have the same id, 'a'; give each its own"):
        build(tmp_path, entries)


@pytest.mark.parametrize("value", ["\ud83d", float("nan")])
def test_metadata_that_json_cannot_hold_are_refused_with_their_line(tmp_path, value):
    document = Document("a", "x", {"key": value}, "c.jsonl:1")
    with pytest.raises(DataError, match="c.jsonl:1: found metadata that JSON cannot hold"):
        build_corpus([document], tmp_path)


def test_metadata_come_back_as_they_were(tmp_path):
    entries = [{"_id": "a", "text": "x", "metadata": {"year": 1, "名": "猫"}, "tags": ["b", None]}, {"text": "y"}]
    corpus = build(tmp_path, entries)
    assert corpus.metadata(0) == {"year": 1, "名": "猫", "tags": ["b", None]}
    assert corpus.document(1)[:3] == ("c.jsonl#2", "y", {})
