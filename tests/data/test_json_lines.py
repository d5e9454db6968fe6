import gzip

import pytest

from rag_retrieval.data.json_lines import json_objects, text_of
from rag_retrieval.data.records import DataError


def error_of(path):
    with pytest.raises(DataError) as caught:
        list(json_objects(path))
    return str(caught.value)


def test_objects_come_with_their_lines_and_blank_lines_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": 1}\n\n{"a": "猫"}'.encode())
    assert list(json_objects(path)) == [(1, {"a": 1}), (3, {"a": "猫"})]


def test_the_bytes_told_add_up_to_the_size_on_disk(tmp_path):
    for name, data in (("a.jsonl", b"{}\n" * 5000), ("a.jsonl.gz", gzip.compress(b"{}\n" * 5000))):
        (tmp_path / name).write_bytes(data)
        told = []
        assert len(list(json_objects(tmp_path / name, told.append))) == 5000
        assert sum(told) == len(data)


@pytest.mark.parametrize(
    "data, message",
    [
        (b'{"a": 1}\n{"a": \n', "a.jsonl:2: found broken JSON"),
        (b"[1]\n", "a.jsonl:1: found JSON that is no object"),
        (b'{}\n{"a": "\xff"}\n', "a.jsonl:2: found the byte 0xff at column 8; expected UTF-8."),
        (gzip.compress(b"{}\n"), "a.jsonl:1: found gzip data; expected plain text: let the file's name end in .gz."),
        ("{}\n".encode("utf-16"), "a.jsonl:1: found a UTF-16 mark; expected UTF-8"),
    ],
)
def test_a_bad_line_is_named(tmp_path, data, message):
    (tmp_path / "a.jsonl").write_bytes(data)
    assert message in error_of(tmp_path / "a.jsonl")


def test_gzip_data_that_end_early_or_are_none_are_told(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b"{}\n" * 1000)[:-4])
    assert "the gzip data ends too early" in error_of(path)
    path.write_bytes(b"{}\n")
    assert "a.jsonl.gz:1: found broken gzip data" in error_of(path)


def test_a_text_must_be_there_be_a_string_and_be_whole():
    assert text_of({"text": "a"}, "text", "f:1") == "a"
    for entry, message in (
        ({"txt": "a"}, "f:1: found no 'text' among the keys 'txt'; add it."),
        ({"text": 3}, "f:1: text is 3; expected a string."),
        ({"text": "a\ud83d"}, "f:1: text has half of a character ('\\ud83d'); mend it."),
    ):
        with pytest.raises(DataError) as caught:
            text_of(entry, "text", "f:1")
        assert str(caught.value) == message
