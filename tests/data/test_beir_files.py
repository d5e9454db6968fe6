import pytest

from rag_retrieval.data.beir_files import document_text, find_file, judgments, query_texts
from rag_retrieval.data.records import DataError


def test_a_plain_file_is_preferred_to_its_gzipped_form_and_one_must_be_there(tmp_path):
    with pytest.raises(DataError, match=r"found neither a.jsonl nor a.jsonl.gz; expected a folder in BEIR layout"):
        find_file(tmp_path, "a.jsonl")
    (tmp_path / "a.jsonl.gz").touch()
    assert find_file(tmp_path, "a.jsonl").name == "a.jsonl.gz"
    (tmp_path / "a.jsonl").touch()
    assert find_file(tmp_path, "a.jsonl").name == "a.jsonl"


def test_a_byte_order_mark_blank_lines_and_windows_line_ends_do_no_harm(tmp_path):
    (tmp_path / "train.tsv").write_bytes(b"\xef\xbb\xbfquery-id\tcorpus-id\tscore\r\n\r\n1\td0\t2.0\r\n")
    assert list(judgments(tmp_path / "train.tsv")) == [(3, "1", "d0", 2.0)]


def test_a_judgment_that_is_said_twice_counts_and_one_that_is_contradicted_is_refused(tmp_path):
    file = tmp_path / "train.tsv"
    file.write_text("1\td0\t1\n1\td0\t1\n")
    assert len(list(judgments(file))) == 2
    file.write_text("1\td0\t1\n1\td0\t0\n")
    with pytest.raises(DataError, match="train.tsv:2: document 'd0' of query '1' has the grade 0 here and 1 above"):
        list(judgments(file))


@pytest.mark.parametrize("grade", ["inf", "nan", "good", ""])
def test_a_grade_is_a_finite_number(tmp_path, grade):
    (tmp_path / "train.tsv").write_text(f"1\td0\t{grade}\n")
    with pytest.raises(DataError, match=f"train.tsv:1: the grade is '{grade}'; expected a number"):
        list(judgments(tmp_path / "train.tsv"))


def test_a_repeated_query_id_is_refused(tmp_path):
    (tmp_path / "queries.jsonl").write_text('{"_id": "1", "text": "a"}\n{"_id": "1", "text": "b"}\n')
    with pytest.raises(DataError, match="queries.jsonl:2: the _id '1' was given before"):
        query_texts(tmp_path / "queries.jsonl")


def test_a_title_stands_before_the_body_and_must_be_a_string():
    assert document_text({"title": "a", "text": "b"}, "f:1") == "a b"
    assert document_text({"title": None, "text": "b"}, "f:1") == document_text({"title": "", "text": "b"}, "f:1") == "b"
    with pytest.raises(DataError, match="f:1: title is 0; expected a string"):
        document_text({"title": 0, "text": "b"}, "f:1")
