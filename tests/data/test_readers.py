"""Record files and hub datasets: every layout that is read, and every error with its file and line."""

import gzip
import json
import os
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from record_samples import GOOD, error_of, read, write_lines

from rag_retrieval.core.config import Config
from rag_retrieval.data.readers import (
    DATASET_HELP,
    SUFFIXES,
    DatasetName,
    entry_text,
    is_file,
    read_records,
    row_objects,
)
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
        "owner/name[train]: no file of this name, and the hub data set could not be loaded (Couldn't reach the hub); "
        "check the path, or the name (owner/name@revision#configuration), split and connection."
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


def test_a_byte_that_is_not_utf8_is_reported_with_line_and_column(tmp_path):
    good = json.dumps(GOOD).encode()
    path = write_lines(tmp_path / "a.jsonl", [good, b'{"query": "\xe9t\xe9"}', good])
    assert error_of(path) == f"{path}:2: found the byte 0xe9 at column 12; expected UTF-8."
    path = write_lines(tmp_path / "b.jsonl", [b'\xef\xbb\xbf{"query": "\xff"}'])
    assert error_of(path) == f"{path}:1: found the byte 0xff at column 12; expected UTF-8."


def test_a_parquet_text_that_is_not_utf8_is_reported_with_its_row(tmp_path):
    content = pa.Array.from_buffers(
        pa.string(), 2, [None, pa.array([0, 1, 3], pa.int32()).buffers()[1], pa.py_buffer(b"ab\xff")]
    )
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"query": ["q", "q"], "content": content, "label": [1, 1]}), path)
    assert error_of(path) == (f"{path}:2: found the byte 0xff at byte offset 1 of a text of this row; expected UTF-8.")


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
    expected = f"expected a file that ends in {', '.join(SUFFIXES)}."
    assert error_of(str(tmp_path)) == f"{tmp_path}: found a folder; {expected}"


def test_a_pipe_is_refused_instead_of_waited_for(tmp_path):
    path = tmp_path / "a.jsonl"
    os.mkfifo(path)
    expected = f"expected a file that ends in {', '.join(SUFFIXES)}."
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
    expected = f"expected a file that ends in {', '.join(SUFFIXES)}."
    assert error_of(path) == f"{path}: found the suffix '.csv'; {expected}"


def test_a_json_list_under_the_name_of_json_lines_is_refused(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", ["", [GOOD, GOOD]])
    expected = "found a JSON list; expected one record per line: let the name end in .json."
    assert error_of(path) == f"{path}:2: {expected}"


def test_a_utf16_file_is_one_error_not_one_for_each_line(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD) + "\n" + json.dumps(GOOD) + "\n", encoding="utf-16")
    assert error_of(path) == (f"{path}:1: found a UTF-16 mark; expected UTF-8: save the file as UTF-8.")


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


def test_the_fault_that_ends_a_file_is_shown_after_twenty_others(tmp_path):
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


def test_a_repeated_key_is_refused_with_its_line_in_nested_objects_too(tmp_path):
    twice = '{"query": "q", "content": "a", "content": "b", "label": 1}'
    nested = '{"query": "q", "hits": [{"content": "a", "label": 1, "label": 0}]}'
    path = write_lines(tmp_path / "a.jsonl", [GOOD, twice, nested])
    first, second = error_of(path).splitlines()
    assert first.startswith(f"{path}:2: ") and "'content' twice" in first
    assert second.startswith(f"{path}:3: ") and "'label' twice" in second


def test_a_repeated_parquet_column_is_refused_in_structs_too(tmp_path):
    path = tmp_path / "a.parquet"
    columns = [pa.array(["q"]), pa.array(["d"]), pa.array([1]), pa.array([0])]
    pq.write_table(pa.Table.from_arrays(columns, names=["query", "content", "label", "label"]), path)
    assert error_of(path).startswith(f"{path}:1: ") and "'label' twice" in error_of(path)
    hit = pa.StructArray.from_arrays([pa.array(["d"]), pa.array([1]), pa.array([0])], ["content", "label", "label"])
    hits = pa.ListArray.from_arrays(pa.array([0, 1], pa.int32()), hit)
    pq.write_table(pa.table({"query": ["q"], "hits": hits}), path)
    assert error_of(path).startswith(f"{path}:1: ") and "'label' twice" in error_of(path)


def test_the_checksums_of_parquet_pages_are_verified(tmp_path):
    path = tmp_path / "a.parquet"
    table = pa.table({"query": ["where is it"], "content": ["in the other house"], "label": [1]})
    pq.write_table(table, path, write_page_checksum=True, compression="none", use_dictionary=False)
    data = path.read_bytes()
    path.write_bytes(data.replace(b"in the other", b"in the ocher"))
    assert error_of(path).startswith(f"{path}:1: found broken Parquet data (")


def test_a_hub_data_set_is_named_with_revision_and_configuration(monkeypatch):
    asked = []

    def load_dataset(*names, **options):
        asked.append((names, options))
        return datasets.Dataset.from_list([GOOD])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for name in ("o/n@v1.0#zh", "o/n#zh", "o/n@refs/pr/1", "n"):
        assert len(read(name, split="dev")) == 1
    split = {"split": "dev"}
    assert asked == [
        (("o/n",), split | {"name": "zh", "revision": "v1.0"}),
        (("o/n",), split | {"name": "zh"}),
        (("o/n",), split | {"revision": "refs/pr/1"}),
        (("n",), split),
    ]


def test_one_function_says_what_is_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").touch()
    files = [f"a{suffix}" for suffix in SUFFIXES] + ["A.JSONL", "x.csv", "a/b/c", "./a", "~/a", "/a", "here"]
    assert all(map(is_file, files))
    assert not any(map(is_file, ["name", "owner/name", "owner/name-v1.5", "owner/name@refs/pr/1#zh"]))


def test_a_configuration_takes_hub_names_but_no_missing_files(tmp_path):
    class Sample(Config):
        data: DatasetName

    def find(name):
        return Sample.model_validate({"data": name}, context={"folders": [tmp_path]}).data

    for name in ("owner/name", "owner/name@refs/pr/1", "owner/name#zh", "o/n@v1.0#zh-en"):
        assert find(name) == name
    (tmp_path / "a.tsv").touch()
    assert find("a.tsv") == str(tmp_path / "a.tsv")
    for name in ("b.tsv", "b.jsonl.gz", "./b", "owner/na me"):
        with pytest.raises(ValueError, match="found no file"):
            find(name)


def test_help_and_pages_name_every_format():
    page = (Path(__file__).parents[2] / "docs" / "data.md").read_text(encoding="utf-8")
    for suffix in SUFFIXES:
        assert suffix in DATASET_HELP
        assert suffix.removesuffix(".gz") in page


# ---- triples

TRIPLES = ["what eats bamboo\tthe panda\tthe tiger", "什么吃鱼\t猫\t牛"]


@pytest.mark.parametrize("suffix", [".tsv", ".tsv.gz", ".TSV"])
def test_a_triple_is_a_query_a_positive_and_a_negative(tmp_path, suffix):
    path = write_lines(tmp_path / f"a{suffix}", ["\ufeff" + TRIPLES[0], "", TRIPLES[1] + "\r"])
    got = [(one.query, one.documents, one.labels, one.positive, one.line) for one in read(path)]
    assert got == [
        ("what eats bamboo", ["the panda", "the tiger"], [1, 0], [True, False], 1),
        ("什么吃鱼", ["猫", "牛"], [1, 0], [True, False], 3),
    ]


def test_a_header_of_triples_is_passed_over(tmp_path):
    path = write_lines(tmp_path / "a.tsv", ["query\tpositive\tnegative", *TRIPLES])
    assert [one.line for one in read(path)] == [2, 3]


def test_a_file_of_ids_is_refused_once_with_what_to_do(tmp_path):
    for first in ("1185869\t0\t1185870", "query-id\tcorpus-id\tscore"):
        path = write_lines(tmp_path / "a.tsv", [first, "1\t2\t3", "4\t5\t6"])
        [line] = error_of(path).splitlines()
        assert line.startswith(f"{path}:1: ") and "ids" in line and "expected texts" in line


def test_bad_lines_of_triples_are_collected(tmp_path):
    path = write_lines(tmp_path / "a.tsv", [TRIPLES[0], "a\tb", " \tp\tn", "a\tb\tc\td", b"a\t\xff\tb", TRIPLES[1]])
    lines = error_of(path).splitlines()
    assert [line.removeprefix(f"{path}:").split(":")[0] for line in lines] == ["2", "3", "4", "5"]
    assert "2 columns" in lines[0] and "query is empty" in lines[1] and "4 columns" in lines[2] and "0xff" in lines[3]


# ---- files that are read to the first bad line


def first_error(path):
    with pytest.raises(DataError) as caught:
        list(row_objects(path))
    return str(caught.value)


def test_objects_come_with_their_lines_and_blank_lines_are_counted(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes('\ufeff{"a": 1}\n\n{"a": "猫"}'.encode())
    assert list(row_objects(path)) == [(1, {"a": 1}), (3, {"a": "猫"})]


def test_the_bytes_reported_add_up_to_the_size_on_disk(tmp_path):
    for name, data in (("a.jsonl", b"{}\n" * 5000), ("a.jsonl.gz", gzip.compress(b"{}\n" * 5000))):
        (tmp_path / name).write_bytes(data)
        counts = []
        assert len(list(row_objects(tmp_path / name, counts.append))) == 5000
        assert sum(counts) == len(data)


def test_the_first_bad_line_of_a_corpus_is_named(tmp_path):
    for data, line, named in (
        (b'{"a": 1}\n{"a": \n', 2, "broken JSON"),
        (b"{}\n3\n", 2, "no object"),
        (b'{}\n{"a": "\xff"}\n', 2, "0xff"),
        (b'{"a": 1, "a": 2}\n', 1, "'a' twice"),
        (gzip.compress(b"{}\n"), 1, "gzip"),
        ("{}\n".encode("utf-16"), 1, "UTF-16"),
    ):
        (tmp_path / "a.jsonl").write_bytes(data)
        message = first_error(tmp_path / "a.jsonl")
        assert message.startswith(f"{tmp_path}/a.jsonl:{line}: ") and named in message
    (tmp_path / "a.jsonl.gz").write_bytes(b"{}\n")
    assert first_error(tmp_path / "a.jsonl.gz").startswith(f"{tmp_path}/a.jsonl.gz:1: ")


def test_a_text_must_be_there_be_a_string_and_be_whole():
    assert entry_text({"text": "a"}, "text", "f:1") == "a"
    for entry, named in (
        ({"txt": "a"}, "no 'text' but 'txt'"),
        ({"x": "a"}, "no 'text' among the keys 'x'"),
        ({"text": 3}, "text is the number 3"),
        ({"text": "a\ud83d"}, "half of a character"),
    ):
        with pytest.raises(DataError, match=f"^f:1: .*{named}"):
            entry_text(entry, "text", "f:1")


# ---- one array in a .json file


@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
@pytest.mark.parametrize("indent", [None, 1])
def test_a_json_file_may_hold_one_array(tmp_path, name, indent):
    records = [GOOD, GOOD | {"query": "[, ]"}, GOOD | {"content": "\n"}]
    path = write_lines(tmp_path / name, [json.dumps(records, indent=indent)])
    found = read(path)
    assert [(record.query, record.documents) for record in found] == [("q", ["d"]), ("[, ]", ["d"]), ("q", ["\n"])]
    assert [record.line for record in found] == ([2, 7, 12] if indent else [1, 1, 1])


def test_broken_arrays_are_reported_with_their_line(tmp_path):
    good = json.dumps(GOOD)
    for text, line in (
        (f"[\n{good}\n{good}]", 3),
        (f"[\n{good},\n]", 3),
        (f"[{good}", 2),  # where the file ends
        (f"[\n{good},\n\n{{", 4),
        ('[{"query": "q", "query": "q"}]', 1),
        (f"[{good}]\n{good}", 1),
    ):
        assert error_of(write_lines(tmp_path / "a.json", [text])).startswith(f"{tmp_path / 'a.json'}:{line}: "), text
    bad = error_of(write_lines(tmp_path / "a.json", [f"[\n{good},\n{{}},\n1]"]))
    assert f"{tmp_path / 'a.json'}:3: " in bad and f"{tmp_path / 'a.json'}:4: " in bad
    assert "no records" in error_of(write_lines(tmp_path / "a.json", ["[ ]"]))
    assert "0xff" in error_of(write_lines(tmp_path / "a.json", [b"[\n\xff]"]))
