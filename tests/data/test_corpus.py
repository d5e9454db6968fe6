import pytest
from mining_samples import corpus_of, write_jsonl

from rag_retrieval.data.corpus import Corpus, build_corpus, text_hash
from rag_retrieval.data.records import DataError


def build(tmp_path, entries, needs_ids=True):
    folder = tmp_path / "built"
    folder.mkdir()
    build_corpus(write_jsonl(tmp_path / "c.jsonl", entries), folder, needs_ids)
    return Corpus(folder)


def test_texts_and_ids_come_back_and_a_title_stands_before_its_text(tmp_path):
    corpus = build(
        tmp_path,
        [
            {"_id": "a", "title": "Panda", "text": "eats bamboo"},
            {"_id": "猫", "text": "猫吃鱼"},
            {"_id": "", "title": "", "text": ""},
            {"_id": "z", "title": None, "text": "last"},
        ],
    )
    assert [corpus.text(row) for row in range(4)] == ["Panda eats bamboo", "猫吃鱼", "", "last"]
    assert [corpus.id(row) for row in range(4)] == ["a", "猫", "", "z"]
    assert [corpus.row_of_id(id_) for id_ in ("z", "猫", "", "b")] == [3, 1, 2, None]


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


@pytest.mark.parametrize(
    "entries, message",
    [
        ([], "c.jsonl: found no documents; expected one per line."),
        ([{"_id": "a", "text": "x"}, {"text": "y"}], "c.jsonl:2: found no '_id' among the keys 'text'; add it."),
        ([{"_id": "a"}], "c.jsonl:1: found no 'text' among the keys '_id'; add it."),
        ([{"_id": "a", "text": "x", "title": 4}], "c.jsonl:1: title is the number 4; expected a string."),
        (
            [{"_id": "a", "text": "x"}, {"_id": "b", "text": "x"}, {"_id": "a", "text": "y"}],
            "c.jsonl:3: the _id 'a' is already that of line 1; give each document its own.",
        ),
    ],
)
def test_an_unusable_corpus_is_refused_with_its_line(tmp_path, entries, message):
    with pytest.raises(DataError) as caught:
        build(tmp_path, entries)
    assert str(caught.value) == f"{tmp_path}/{message}"


def test_a_corpus_for_records_needs_no_ids(tmp_path):
    assert build(tmp_path, [{"text": "x"}, {"text": "y"}], needs_ids=False).text(1) == "y"
