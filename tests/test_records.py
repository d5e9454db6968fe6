"""Ranking records: what is accepted, and every error with its file and line."""

import gzip
import json
import math

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rag_retrieval.records import DataError, RecordRules, positives, read_records

GOOD = {"query": "q", "content": "d", "label": 1}


def write_lines(path, lines):
    """Lines as given where they are text or bytes, else as JSON."""
    encoded = [
        line if isinstance(line, bytes) else (line if isinstance(line, str) else json.dumps(line)).encode()
        for line in lines
    ]
    data = b"".join(line + b"\n" for line in encoded)
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def read(path, split="train", **rules):
    return list(read_records(path, RecordRules(**rules), split=split))


def error_of(path, **rules):
    with pytest.raises(DataError) as caught:
        read(path, **rules)
    return str(caught.value)


# ---- accepted records


def test_pointwise_hits_and_pos_neg_records_are_told_apart_in_one_file(tmp_path):
    path = write_lines(
        tmp_path / "mixed.jsonl",
        [
            {"query": "a", "content": "d1", "label": 0.5},
            {"query": "b", "hits": [{"content": "d2", "label": 2}, {"content": "d3", "label": 0}]},
            {"query": "c", "pos": ["d4"], "neg": ["d5", "d6"]},
            {"query": "d", "pos": ["d7"], "neg": ["d8"], "pos_scores": [7.5], "neg_scores": [-2]},
            {"query": "e", "pos": ["d9"]},
        ],
    )
    got = [(r.query, r.documents, r.labels, r.positive, r.format, r.line) for r in read(path)]
    assert got == [
        ("a", ["d1"], [0.5], [True], "pointwise", 1),
        ("b", ["d2", "d3"], [2, 0], [True, False], "hits", 2),
        ("c", ["d4", "d5", "d6"], [1, 0, 0], [True, False, False], "pos_neg", 3),
        ("d", ["d7", "d8"], [7.5, -2], [True, False], "pos_neg", 4),
        ("e", ["d9"], [1], [True], "pos_neg", 5),
    ]


@pytest.mark.parametrize(
    ("labels", "expected"),
    [
        ([1, 0, 0], [True, False, False]),
        ([3, 1, 2], [True, False, True]),
        ([0.9, 0.1], [True, False]),
        ([-1, -2], [True, False]),
        ([0, 0], [False, False]),
        ([2, 2], [True, True]),
        ([1], [True]),
        ([0], [False]),
    ],
)
def test_positives_are_above_the_lowest_label_or_above_zero_where_all_are_equal(labels, expected):
    assert positives(labels) == expected


def test_labels_are_exact_float32_values(tmp_path):
    [record] = read(write_lines(tmp_path / "a.jsonl", [GOOD | {"label": 0.99988}]))
    # 0.99988 = 16775202.77 / 2**24, so the nearest float32 below 1 has the mantissa 16775203
    assert record.labels == [16775203 / 2**24]


def test_label_key_names_the_label_of_pointwise_records_and_of_hits(tmp_path):
    lines = [
        {"query": "q", "content": "d", "score": 0.25, "label": "x"},
        {"query": "q", "hits": [{"content": "d", "score": 2}]},
    ]
    got = read(write_lines(tmp_path / "a.jsonl", lines), label_key="score")
    assert [record.labels for record in got] == [[0.25], [2]]


def test_unknown_keys_are_ignored_and_null_stands_for_an_absent_optional_key(tmp_path):
    lines = [
        GOOD | {"id": 7, "title": None, "meta": {"a": [1]}},
        {"query": "q", "pos": ["d"], "neg": None, "pos_scores": None, "hits": None, "prompt": "p"},
        {"query": "q", "pos": ["d"], "neg": ["e"], "neg_ids": [3]},  # no misspelling: neg itself is there
    ]
    got = read(write_lines(tmp_path / "a.jsonl", lines))
    assert [record.format for record in got] == ["pointwise", "pos_neg", "pos_neg"]


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


def test_an_empty_document_is_a_legal_document(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [GOOD | {"content": ""}, {"query": "q", "pos": [""]}])
    assert [record.documents for record in read(path)] == [[""], [""]]


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


# ---- bad lines, each on line 3 after a good and a blank one

BAD_RECORDS = [
    ("{'query': 1}", "found broken JSON at column 2 (Expecting property name enclosed in double quotes)"
     "; expected one whole object per line."),
    ('{"query": "q", "content": ', "found broken JSON at column 27 (Expecting value)"
     "; expected one whole object per line."),
    ('"text"', "found the string 'text'; expected an object with the keys of one record."),
    ("[1]", "found a list; expected an object with the keys of one record."),
    ("null", "found null; expected an object with the keys of one record."),
    ("3", "found the number 3; expected an object with the keys of one record."),
    ({"content": "d", "label": 1, "id": 2},
     "found no 'query' among the keys 'content', 'label', 'id'; add it."),
    ({"qurey": "q", "content": "d", "label": 1}, "found no 'query' but 'qurey'; rename it to 'query'."),
    ({"query": "q", "contnet": "d", "label": 1}, "found no 'content' but 'contnet'; rename it to 'content'."),
    ({"query": "q", "hit": [], "id": 1}, "found no 'hits' but 'hit'; rename it to 'hits'."),
    ({"query": "q", "text": "d"},
     "found the keys 'query', 'text'; expected one of 'content', 'hits', 'pos'."),
    ({"query": "q", "content": "d", "lable": 1}, "found no 'label' but 'lable'; rename it to 'label'."),
    ({"query": "q", "content": "d", "score": 1}, "found no 'label' among the keys 'query', 'content', 'score'"
     "; add it, or set label_key to the key that holds the label."),
    ({"query": "q", "hits": [{"content": "d", "label": 1}, {"contents": "d", "label": 1}]},
     "found no 'content' in hits[1] but 'contents'; rename it to 'content'."),
    ({"query": "q", "hits": [{"content": "d"}]}, "found no 'label' in hits[0] among the keys 'content'"
     "; add it, or set label_key to the key that holds the label."),
    ({"query": "q", "hits": [], "pos": ["d"]},
     "found both 'hits', 'pos'; expected one format: keep one of these keys."),
    ({"query": "q", "pos": ["d"], "negs": ["d"]}, "found 'negs', which looks like 'neg'; rename it."),
    ({"query": "q", "pos": ["d"], "negatives": ["d"]},
     "found 'negatives', which looks like 'neg'; rename it."),
    ({"query": "q", "pos": ["d"], "pos_score": [1]},
     "found 'pos_score', which looks like 'pos_scores'; rename it."),
    ({"query": 5, "content": "d", "label": 1}, "query is the number 5; expected a string."),
    ({"query": "", "content": "d", "label": 1}, "query is empty; expected text."),
    ({"query": " \t\n", "content": "d", "label": 1}, "query is empty; expected text."),
    ({"query": "q", "content": None, "label": 1}, "content is null; expected a string."),
    ({"query": "q", "content": ["d"], "label": 1}, "content is a list; expected a string."),
    ({"query": "q", "content": "d", "label": "1"}, "label is the string '1'; expected a number."),
    ({"query": "q", "content": "d", "label": True}, "label is true; expected a number."),
    ({"query": "q", "content": "d", "label": None}, "label is null; expected a number."),
    ({"query": "q", "content": "d", "label": math.nan},
     "label is nan; expected a finite number that float32 can hold."),
    ({"query": "q", "content": "d", "label": -math.inf},
     "label is -inf; expected a finite number that float32 can hold."),
    ({"query": "q", "content": "d", "label": 1e39},
     "label is 1e+39; expected a finite number that float32 can hold."),
    ({"query": "q", "content": "\ud83d", "label": 1},
     r"content has half of a character ('\ud83d'); expected its pair too."),
    ({"query": "q", "hits": "d"}, "hits is the string 'd'; expected a list of objects."),
    ({"query": "q", "hits": []}, "hits is an empty list; expected at least one document."),
    ({"query": "q", "hits": ["d"]}, "hits[0] is the string 'd'; expected an object with content and label."),
    ({"query": "q", "hits": [{"content": "d", "label": False}]},
     "hits[0].label is false; expected a number."),
    ({"query": "q", "hits": [{"content": 1, "label": 1}]},
     "hits[0].content is the number 1; expected a string."),
    ({"query": "q", "pos": []}, "pos is an empty list; expected at least one document."),
    ({"query": "q", "pos": "d"}, "pos is the string 'd'; expected a list of strings."),
    ({"query": "q", "pos": ["d"], "neg": [{"content": "d"}]}, "neg[0] is an object; expected a string."),
    ({"query": "q", "pos": ["a", "b", "c"], "pos_scores": [1, 2]},
     "pos has 3 documents but pos_scores has 2; give one score per document."),
    ({"query": "q", "pos": ["a"], "neg": ["b"], "pos_scores": [1], "neg_scores": [1, 2]},
     "neg has 1 document but neg_scores has 2; give one score per document."),
    ({"query": "q", "pos": ["a"], "pos_scores": [1], "neg_scores": [1]},
     "neg has 0 documents but neg_scores has 1; give one score per document."),
    ({"query": "q", "pos": ["a"], "neg": ["b", "c"], "pos_scores": [1]},
     "found pos_scores without neg_scores for 2 neg; give both or neither."),
    ({"query": "q", "pos": ["a"], "neg": ["b"], "neg_scores": [1]},
     "found neg_scores without pos_scores; give both or neither."),
    ({"query": "q", "pos": ["a"], "pos_scores": ["x"]},
     "pos_scores[0] is the string 'x'; expected a number."),
    ({"query": "q", "pos": ["a"], "pos_scores": 1},
     "pos_scores is the number 1; expected a list of numbers."),
]  # fmt: skip


@pytest.mark.parametrize(("bad", "message"), BAD_RECORDS, ids=[message[:50] for _, message in BAD_RECORDS])
def test_a_bad_record_is_reported_with_file_and_line(tmp_path, bad, message):
    path = write_lines(tmp_path / "train.jsonl", [GOOD, "", bad, GOOD])
    assert error_of(path) == f"{path}:3: {message}"


@pytest.mark.parametrize(
    ("record", "found"),
    [
        (GOOD | {"label": 2.5}, "label is 2.5"),
        (GOOD | {"label": -1}, "label is -1"),
        ({"query": "q", "hits": [{"content": "d", "label": 3}]}, "hits[0].label is 3"),
        ({"query": "q", "pos": ["d"], "pos_scores": [2.0000001]}, "pos_scores[0] is 2.0000001"),
    ],
)
def test_a_label_outside_the_range_is_reported_with_the_range(tmp_path, record, found):
    path = write_lines(tmp_path / "a.jsonl", [GOOD | {"label": 0}, GOOD | {"label": 2}, record])
    expected = "expected a value in [0, 2]: correct it, or change min_label and max_label."
    assert error_of(path, min_label=0, max_label=2) == f"{path}:3: {found}; {expected}"


def test_pos_and_neg_without_scores_are_named_when_0_is_outside_the_range(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"query": "q", "pos": ["d"], "neg": ["e"]}])
    assert error_of(path, min_label=1) == (
        f"{path}:1: the label of a document is 0.0 (pos and neg without scores count as 1 and 0); "
        "expected a value in [1, inf]: correct it, or change min_label and max_label."
    )


@pytest.mark.parametrize(
    ("labels", "shown"), [([1, 1, 0], "1, 1, 0"), ([0, 0], "0, 0"), ([1, 0.5], "1, 0.5"), ([2, 0], "2, 0")]
)
def test_hits_without_exactly_one_positive_are_reported_where_that_is_demanded(tmp_path, labels, shown):
    def hits(labels):
        return {"query": "q", "hits": [{"content": "d", "label": label} for label in labels]}

    path = write_lines(tmp_path / "a.jsonl", [hits([0, 1]), hits(labels), {"query": "q", "pos": ["a", "b"]}])
    assert len(read(path)) == 3
    assert error_of(path, exactly_one_positive=True) == (
        f"{path}:2: hits has the labels {shown}; "
        "expected exactly one 1 and the rest 0 for listwise cross entropy."
    )


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
