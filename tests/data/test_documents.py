"""What may be a corpus, and how texts are cut into passages."""

import gzip
import json
import os
from datetime import date
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mining_samples import write_jsonl

from rag_retrieval.data.corpus import build_corpus
from rag_retrieval.data.documents import cut_passages, read_documents, source_content
from rag_retrieval.data.records import DataError

ROWS = [
    {"_id": "a", "title": "Panda", "text": "eats bamboo", "metadata": {"year": 1869}, "source": "book"},
    {"id": 7, "text": "猫吃鱼", "metadata": None},
    {"text": "no id", "title": None},
]
EXPECTED = [
    ("a", "Panda eats bamboo", {"year": 1869, "source": "book"}),
    ("7", "猫吃鱼", {}),
]


def read(source, **rules):
    return [document[:3] for document in read_documents(source, **rules)]


def test_rows_of_json_lines_gzip_and_parquet_are_the_same_documents(tmp_path):
    plain = write_jsonl(tmp_path / "c.jsonl", ROWS)
    assert read(plain) == [*EXPECTED, ("c.jsonl#3", "no id", {})]
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(plain.read_bytes()))
    assert read(packed) == [*EXPECTED, ("c.jsonl.gz#3", "no id", {})]
    columns = {"_id": ["a", "7"], "title": ["Panda", None], "text": ["eats bamboo", "猫吃鱼"]}
    columns["day"] = [date(2020, 1, 2)] * 2
    pq.write_table(pa.table(columns), tmp_path / "c.parquet")
    assert read(tmp_path / "c.parquet")[0] == ("a", "Panda eats bamboo", {"day": date(2020, 1, 2)})
    (tmp_path / "built").mkdir()
    assert build_corpus(read_documents(tmp_path / "c.parquet"), tmp_path / "built").metadata(1) == {"day": "2020-01-02"}


def test_a_beir_folder_is_its_corpus_file_and_needs_ids(tmp_path):
    write_jsonl(tmp_path / "corpus.jsonl", ROWS[:2])
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "q", "text": "?"}])
    content = source_content(tmp_path)
    assert read(tmp_path) == EXPECTED
    write_jsonl(tmp_path / "queries.jsonl", [{"_id": "other", "text": "?"}])
    assert source_content(tmp_path) == content, "queries are no documents"
    write_jsonl(tmp_path / "corpus.jsonl", ROWS)
    assert source_content(tmp_path) != content
    with pytest.raises(DataError, match="corpus.jsonl:3: found no '_id' among the keys 'text', 'title'; add it."):
        read(tmp_path)


def test_a_folder_of_texts_gives_passages_with_their_place(tmp_path):
    (tmp_path / "guide").mkdir()
    texts = {"b.txt": "one two\n\nthree four\r\n\r\nfive", "guide/a.md": "# Set up\n\nRun it.", ".hidden.md": "no",
             "guide/empty.md": " \n", "c.pdf": "no"}  # fmt: skip
    for name, text in texts.items():
        (tmp_path / name).write_bytes(text.encode())
    found = read(tmp_path, passage_tokens=8)
    assert [(id_, text) for id_, text, _ in found] == [
        ("b.txt#1", "one two\n\nthree four\r\n\r\nfive"), ("guide/a.md#1", "# Set up\n\nRun it.")]  # fmt: skip
    for _, text, metadata in read(tmp_path, passage_tokens=2):
        assert texts[metadata["file"]][metadata["start"] : metadata["end"]] == text
    place = {"file": "b.txt", "start": 23, "end": 27}
    assert read(tmp_path / "b.txt", passage_tokens=4)[1] == ("b.txt#2", "five", place)


def passages(text, limit):
    return [text[start:end] for start, end in cut_passages(text, limit)]


def test_paragraphs_are_packed_up_to_the_limit_and_headings_stay_with_theirs():
    text = "# One\n\na b c\n\nd e\n\n## Two\n\nf g"
    assert passages(text, 100) == [text]
    assert passages(text, 8) == ["# One\n\na b c\n\nd e", "## Two\n\nf g"]
    assert passages(text, 6) == ["# One\n\na b c", "d e", "## Two\n\nf g"]


def test_a_long_paragraph_is_cut_after_a_sentence_else_at_the_limit():
    assert passages("a b c d e. f g 3.5 h", 8) == ["a b c d e.", "f g 3.5 h"]
    assert passages("a b c d e f g h i", 4) == ["a b c d", "e f g h", "i"]
    assert passages("熊猫吃竹子。老虎吃肉。", 8) == ["熊猫吃竹子。", "老虎吃肉。"]
    assert passages("x" * 100, 2) == ["x" * 32] * 3 + ["x" * 4]


def test_passages_of_100_000_characters_leave_nothing_out():
    text = "".join(f"Satz {number}. " if number % 7 else f"{number}\n\n" for number in range(9000))
    cut = passages(text, 50)
    assert "".join("".join(cut).split()) == "".join(text.split())


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("c.jsonl", b"", "c.jsonl: found no documents; expected at least one."),
        ("c.jsonl", b'{"_id": "a"}', "c.jsonl:1: found no 'text' among the keys '_id'; add it."),
        ("c.jsonl", b'{"_id": "a", "text": "x", "title": 4}', "c.jsonl:1: title is the number 4; expected a string."),
        ("c.jsonl", b'{"_id": 1.5, "text": "x"}', "c.jsonl:1: _id is the number 1.5; expected a string."),
        ("c.jsonl", b'{"_id": "", "text": "x"}', "c.jsonl:1: _id is empty; give the document one, or"),
        ("c.txt", b" \n", "c.txt: found no documents; expected at least one."),
        ("c.txt", b"caf\xe9", "c.txt: found the byte 0xe9 at byte offset 3; expected UTF-8."),
        ("c.pdf", b"x", "c.pdf: found the suffix '.pdf'; expected .jsonl, .jsonl.gz, .json, .json.gz, .parquet,"),
        ("d/c.pdf", b"x", "d: found neither corpus.jsonl nor corpus.jsonl.gz, nor texts in it; expected"),
        ("d/e", b"x", "d/nowhere: no such file or folder; expected"),
    ],
)
def test_an_unusable_source_is_refused_with_its_place(tmp_path, name, content, message):
    file = tmp_path / name
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(content)
    source = tmp_path / message.partition(":")[0]
    with pytest.raises(DataError) as caught:
        read(source)
    assert str(caught.value).startswith(f"{tmp_path}/{message}")


def test_a_file_name_that_is_no_utf8_is_refused(tmp_path):
    Path(os.fsdecode(os.fsencode(tmp_path) + b"/bad\xff.txt")).write_text("a")
    with pytest.raises(DataError, match=r"/bad\\udcff.txt': the name has bytes that are no UTF-8; rename it."):
        read(tmp_path)


def test_a_key_id_beside_the_id_is_metadata(tmp_path):
    file = tmp_path / "c.jsonl"
    file.write_text(json.dumps({"_id": "a", "id": "b", "text": "x", "metadata": "plain"}))
    assert read(file) == [("a", "x", {"id": "b", "metadata": "plain"})]
