"""Texts of every kind as passages: what is cut, what is kept, and when the cache is read again."""

import json
import os
import pickle

import pyarrow
import pyarrow.parquet
import pytest

from rag_retrieval.data import passages as module
from rag_retrieval.data.corpus import text_hash
from rag_retrieval.data.passages import open_passages
from rag_retrieval.data.records import DataError

LONG = "One two three. Four five six.\n\nSeven eight nine."  # 8 tokens and 4, with the marks
CHINESE = "北京是中国的首都。今天天气怎么样？"  # 17 tokens, a sentence end at 9


def texts(source, tokens: int = 8, cache=None) -> list[str]:
    found = open_passages(source, tokens, cache)
    return [found.text(place) for place in range(len(found))]


def write_rows(path, *rows: dict) -> str:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def test_rows_are_cut_at_paragraphs_and_sentences_and_nothing_is_lost(tmp_path):
    rows = write_rows(tmp_path / "a.jsonl", {"text": LONG}, {"title": "Beijing", "text": CHINESE}, {"text": "short"})
    found = open_passages(rows, 10)
    assert texts(rows, 10) == [
        "One two three. Four five six.", "Seven eight nine.", "Beijing 北京是中国的首都。", "今天天气怎么样？", "short",
    ]  # fmt: skip
    assert [found.document_id(place) for place in range(5)] == [f"a.jsonl#{row}" for row in (1, 1, 2, 2, 3)]
    assert found.document_hashes[0] == found.document_hashes[1] == text_hash(LONG)
    assert len(set(found.document_hashes.tolist())) == 3


def test_parquet_folders_of_texts_and_beir_folders_are_read(tmp_path):
    pyarrow.parquet.write_table(pyarrow.table({"text": ["a panda", "a bear"]}), tmp_path / "b.parquet")
    assert texts(tmp_path / "b.parquet") == ["a panda", "a bear"]
    folder = tmp_path / "guides"
    (folder / "deep").mkdir(parents=True)
    (folder / "a.txt").write_text(LONG)
    (folder / "deep" / "b.md").write_text("# Head\n\nBody.")
    found = open_passages(folder, 8)
    assert texts(folder) == ["One two three. Four five six.", "Seven eight nine.", "# Head\n\nBody."]
    assert found.document_id(1) == "a.txt#2" and found.document_id(2) == "deep/b.md#1"
    beir = tmp_path / "beir"
    beir.mkdir()
    write_rows(beir / "corpus.jsonl", {"_id": "d1", "title": "", "text": "x"})
    assert texts(beir) == ["x"]


def test_the_cache_is_read_again_until_a_file_or_the_limit_changes(tmp_path, monkeypatch):
    rows, reads = write_rows(tmp_path / "a.jsonl", {"text": LONG}), []
    own = module.read_documents
    monkeypatch.setattr(module, "read_documents", lambda *arguments: reads.append(1) or own(*arguments))
    for _ in range(2):
        assert len(texts(rows, cache=tmp_path / "cache")) == 2
    assert len(reads) == 1
    assert texts(rows, 99, tmp_path / "cache") == [LONG] and len(reads) == 2
    os.utime(rows, ns=(1, 1))
    texts(rows, cache=tmp_path / "cache")
    assert len(reads) == 3
    assert not list((tmp_path / "cache").glob("*building*"))


def test_passages_travel_to_another_process_as_their_path(tmp_path):
    found = open_passages(write_rows(tmp_path / "a.jsonl", {"text": LONG}), 8)
    assert found.text(0) and len(pickle.dumps(found)) < 500
    again = pickle.loads(pickle.dumps(found))
    assert again.text(1) == found.text(1) and again.files == found.files and all(map(os.path.isfile, found.files))


def test_documents_without_text_are_left_out_with_a_count_and_none_at_all_is_an_error(tmp_path, caplog):
    assert texts(write_rows(tmp_path / "a.jsonl", {"text": " \n"}, {"text": "x"}, {"text": ""})) == ["x"]
    assert "a.jsonl: 2 documents have no text" in caplog.text
    with pytest.raises(DataError, match=r"b.jsonl: no document has any text"):
        texts(write_rows(tmp_path / "b.jsonl", {"text": ""}))
    with pytest.raises(DataError, match=r"a.csv: found the suffix"):
        (tmp_path / "a.csv").write_text("x")
        texts(tmp_path / "a.csv")
