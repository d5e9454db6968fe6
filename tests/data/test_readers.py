"""Record files and hub datasets: every layout that is read, and every error with its file and line."""

import gzip
import json
import os

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from record_samples import GOOD, error_of, read, write_lines

from rag_retrieval.data.readers import read_records
from rag_retrieval.data.records import DataError, RecordRules

# ---- accepted sources


def test_blank_lines_are_skipped_and_keep_the_numbering(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["", GOOD, "  \t", GOOD, ""])
    assert [record.line for record in read(path)] == [2, 4]


def test_a_utf8_mark_and_windows_line_ends_are_fine(tmp_path):
    path = tmp_path / "a.jsonl"
    line = json.dumps(GOOD).encode()
    path.write_bytes(b"\xef\xbb\xbf" + line + b"\r\n\r\n" + line)
    assert [record.line for record in read(path)] == [1, 3]


def test_line_separators_inside_a_text_do_not_end_the_line(tmp_path):
    text = "one\u2028two\x85three\x0bfour"
    line = json.dumps(GOOD | {"content": text}, ensure_ascii=False).replace("\x0b", "\\u000b")
    assert [record.documents for record in read(write_lines(tmp_path / "a.jsonl", [line]))] == [[text]]


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz", ".json", ".json.gz", ".JSONL"])
def test_chinese_text_is_read_from_each_json_suffix(tmp_path, suffix):
    line = {"query": "什么是重排序", "content": "重排序模型给文档打分😀", "label": 1}
    line = json.dumps(line, ensure_ascii=False)
    [record] = read(write_lines(tmp_path / f"中文{suffix}", [line]))
    assert (record.query, record.documents) == ("什么是重排序", ["重排序模型给文档打分😀"])


def test_parquet_rows_of_all_formats_are_read_with_row_numbers(tmp_path):
    rows = [
        {"query": "什么", "content": "d1", "label": 0.5, "hits": None, "pos": None, "neg": None},
        {"query": "b", "hits": [{"content": "d2", "label": 1.0}], "content": None, "label": None},
        {"query": "c", "pos": ["d3"], "neg": ["d4"]},
    ]
    path = tmp_path / "a.parquet"
    pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=2)
    got = [(record.query, record.documents, record.labels, record.line) for record in read(path)]
    assert got == [("什么", ["d1"], [0.5], 1), ("b", ["d2"], [1], 2), ("c", ["d3", "d4"], [1, 0], 3)]


def test_a_name_that_is_no_file_is_loaded_from_the_hub(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        return datasets.Dataset.from_list([GOOD, GOOD | {"query": ""}, GOOD | {"label": None}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    with pytest.raises(DataError) as caught:
        read("owner/pairs-v1.5", split="test")
    assert asked == [("owner/pairs-v1.5", "test")]
    assert str(caught.value).splitlines() == [
        "owner/pairs-v1.5[test]:2: query is empty; expected text.",
        "owner/pairs-v1.5[test]:3: label is null; expected a number.",
    ]


def test_a_hub_dataset_that_cannot_be_loaded_is_one_clear_error(monkeypatch):
    def load_dataset(name, split):
        raise ConnectionError("Couldn't reach\n the hub")

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert error_of("owner/name") == (
        "owner/name[train]: no file of this name, and the hub dataset could not be loaded "
        "(Couldn't reach the hub); check the path, or the name, split and connection."
    )


# ---- lines that cannot be decoded

BROKEN_JSON = [
    ("{'query': 1}", "found broken JSON at column 2 (Expecting property name enclosed in double quotes)"
     "; expected one whole object per line."),
    ('{"query": "q", "content": ', "found broken JSON at column 27 (Expecting value)"
     "; expected one whole object per line."),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), BROKEN_JSON)
def test_broken_json_is_reported_with_file_and_line(tmp_path, bad, message):
    path = write_lines(tmp_path / "train.jsonl", [GOOD, "", bad, GOOD])
    assert error_of(path) == f"{path}:3: {message}"


def test_a_byte_that_is_not_utf8_is_reported_with_line_and_offset_in_the_file(tmp_path):
    good = json.dumps(GOOD).encode()
    path = write_lines(tmp_path / "a.jsonl", [good, b'{"query": "\xe9t\xe9"}', good])
    # the line begins after the good one and its newline; 11 bytes of it come before the wrong one
    offset = len(good) + 1 + 11
    expected = f"found the byte 0xe9 at byte offset {offset} of the text; expected UTF-8."
    assert error_of(path) == f"{path}:2: {expected}"
    assert path.read_bytes()[offset] == 0xE9


def test_the_offset_of_a_wrong_byte_counts_the_utf8_mark(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [b'\xef\xbb\xbf{"query": "\xff"}'])
    assert error_of(path) == f"{path}:1: found the byte 0xff at byte offset 14 of the text; expected UTF-8."


def test_a_parquet_text_that_is_not_utf8_is_reported_with_its_row(tmp_path):
    content = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 1, 3], pa.int32()).buffers()[1], pa.py_buffer(b"ab\xff")]
    )
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"query": ["q", "q"], "content": content, "label": [1, 1]}), path)
    assert error_of(path) == (
        f"{path}:2: found the byte 0xff at byte offset 1 of a text of this row; expected UTF-8."
    )


# ---- many bad lines, bad sources


def test_the_first_twenty_bad_lines_are_shown_and_the_rest_counted(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [GOOD, *(GOOD | {"label": str(i)} for i in range(25)), GOOD])
    lines = error_of(path).splitlines()
    assert lines[:20] == [f"{path}:{i + 2}: label is the string '{i}'; expected a number." for i in range(20)]
    assert lines[20:] == ["... and 5 more bad lines"]


def test_exactly_twenty_bad_lines_are_shown_without_a_count(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [GOOD | {"label": None}] * 20)
    assert len(error_of(path).splitlines()) == 20


def test_all_good_records_come_before_the_error(tmp_path):
    got = []
    with pytest.raises(DataError):
        for record in read_records(write_lines(tmp_path / "a.jsonl", [GOOD, "x", GOOD]), RecordRules()):
            got.append(record.line)
    assert got == [1, 3]


@pytest.mark.parametrize("lines", [[], ["", "  "]])
@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
def test_a_file_without_records_is_an_error(tmp_path, lines, suffix):
    path = write_lines(tmp_path / f"a{suffix}", lines)
    assert error_of(path) == f"{path}: found no records; expected one record per line (or row)."


def test_a_parquet_file_without_rows_is_an_error(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"query": pa.array([], pa.string())}), path)
    assert error_of(path) == f"{path}: found no records; expected one record per line (or row)."


@pytest.mark.parametrize("name", ["train.jsonl", "a/b/c", "./data", "train.csv"])
def test_a_missing_file_is_named_with_the_current_folder(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    assert error_of(name) == f"{name}: no such file; check the path (the current folder is {tmp_path})."


def test_a_folder_is_refused(tmp_path):
    expected = "expected a file that ends in .jsonl, .jsonl.gz, .json, .json.gz, .parquet."
    assert error_of(str(tmp_path)) == f"{tmp_path}: found a folder; {expected}"


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    expected = "expected a file that ends in .jsonl, .jsonl.gz, .json, .json.gz, .parquet."
    assert error_of(path) == f"{path}: found a pipe or a device; {expected}"


def test_an_endless_device_under_the_name_of_a_data_file_is_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.symlink_to("/dev/zero")
    assert error_of(path).startswith(f"{path}: found a pipe or a device; ")


def test_a_gzip_file_without_a_gzip_name_is_one_error(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(gzip.compress(b"\n".join([json.dumps(GOOD).encode()] * 3)))
    expected = "found gzip data; expected plain text: let the file's name end in .gz."
    assert error_of(path) == f"{path}:1: {expected}"


def test_a_parquet_value_that_python_cannot_hold_is_reported_with_its_row(tmp_path):
    path = tmp_path / "a.parquet"
    times = pa.array([0, 2**62, 0], pa.timestamp("us"))  # the second is in the year 148107
    columns = {name: [value] * 3 for name, value in GOOD.items()}
    pq.write_table(pa.table(columns | {"time": times}), path)
    expected = "found a value that cannot be read (date value out of range); mend it or leave its column out."
    assert error_of(path) == f"{path}:2: {expected}"


def test_a_wrong_suffix_is_refused_with_the_right_ones(tmp_path):
    path = write_lines(tmp_path / "a.csv", ["query,content"])
    expected = "expected a file that ends in .jsonl, .jsonl.gz, .json, .json.gz, .parquet."
    assert error_of(path) == f"{path}: found the suffix '.csv'; {expected}"


def test_a_file_that_is_one_json_list_is_refused_with_the_way_to_convert_it(tmp_path):
    path = write_lines(tmp_path / "a.json", ["", [GOOD, GOOD]])
    expected = "found a JSON list; expected one record per line: convert it (jq -c '.[]')."
    assert error_of(path) == f"{path}:1: {expected}"


def test_a_utf16_file_is_one_error_not_one_for_each_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\n", encoding="utf-16")
    assert error_of(path) == (
        f"{path}:1: found a UTF-16 mark at byte offset 0; expected UTF-8: save the file as UTF-8."
    )


def test_a_file_with_a_gzip_name_that_is_not_gzip_is_refused(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_text(json.dumps(GOOD))
    expected = "found broken gzip data (Not a gzipped file (b'{\"')); expected a gzip file."
    assert error_of(path) == f"{path}:1: {expected}"


def test_a_gzip_file_cut_short_is_reported_after_its_bad_lines(tmp_path):
    path = write_lines(tmp_path / "a.jsonl.gz", [GOOD, "x", *(GOOD | {"id": i} for i in range(2000))])
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    first, last = error_of(path).splitlines()
    assert first.startswith(f"{path}:2: found broken JSON")
    assert last.endswith(": the gzip data ends too early; copy the whole file again.")
    line = int(last.removeprefix(f"{path}:").split(":")[0])
    assert 2 < line < 2002


def test_a_gzip_file_with_flipped_bytes_is_reported(tmp_path):
    path = write_lines(tmp_path / "a.jsonl.gz", [GOOD | {"id": i} for i in range(200)])
    data = bytearray(path.read_bytes())
    data[-8:-4] = b"\0\0\0\0"  # the checksum
    path.write_bytes(data)
    assert "found broken gzip data (CRC check failed" in error_of(path)


def test_a_fault_that_ends_the_file_is_shown_though_twenty_lines_were_bad_before(tmp_path):
    path = write_lines(tmp_path / "a.jsonl.gz", ["x"] * 30)
    path.write_bytes(path.read_bytes()[:-4])
    lines = error_of(path).splitlines()
    assert len(lines) == 21
    assert lines[19] == f"{path}:31: the gzip data ends too early; copy the whole file again."
    assert lines[20] == "... and 11 more bad lines"


def test_a_broken_parquet_file_is_reported(tmp_path):
    path = tmp_path / "a.parquet"
    path.write_bytes(b"PAR1 no parquet at all")
    message = error_of(path)
    assert message.startswith(f"{path}:1: found broken Parquet data (")
    assert message.endswith("; expected a whole file.")
