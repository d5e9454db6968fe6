import gzip

import numpy as np
import pytest
from beir_samples import write, write_toy

from rag_retrieval.data.beir import (
    document_text,
    find_file,
    judgments,
    query_texts,
    read_folder,
    read_pool,
    read_qrels,
    read_run,
    write_run,
)
from rag_retrieval.data.records import DataError


def test_a_plain_file_is_preferred_to_its_gzipped_form(tmp_path):
    with pytest.raises(DataError, match=r"found neither a.jsonl nor a.jsonl.gz; expected a folder in BEIR layout"):
        find_file(tmp_path, "a.jsonl")
    (tmp_path / "a.jsonl.gz").touch()
    assert find_file(tmp_path, "a.jsonl").name == "a.jsonl.gz"
    (tmp_path / "a.jsonl").touch()
    assert find_file(tmp_path, "a.jsonl").name == "a.jsonl"


def test_byte_order_marks_blank_lines_and_windows_line_ends_are_fine(tmp_path):
    (tmp_path / "train.tsv").write_bytes(b"\xef\xbb\xbfquery-id\tcorpus-id\tscore\r\n\r\n1\td0\t2.0\r\n")
    assert list(judgments(tmp_path / "train.tsv")) == [(3, "1", "d0", 2.0)]


def test_a_repeated_judgment_counts_once_a_contradicted_one_is_refused(tmp_path):
    file = tmp_path / "train.tsv"
    file.write_text("1\td0\t1\n1\td0\t1\n")
    assert len(list(judgments(file))) == 2
    file.write_text("1\td0\t1\n1\td0\t0\n")
    with pytest.raises(DataError, match="train.tsv:2: document 'd0' of query '1' has the grade 0 here and 1 above"):
        list(judgments(file))


def test_grades_and_scores_are_finite_numbers_as_trec_writes_them(tmp_path):
    file = tmp_path / "test.tsv"
    for text in ("inf", "nan", "good", "", "1_0", "１", "1e999", "0x1"):
        file.write_text(f"1\td\t2\n1\td0\t{text}\n")
        with pytest.raises(DataError, match=f"test.tsv:2: the grade is '{text}'; expected a finite number"):
            list(judgments(file))
        file.write_text(f"1 Q0 d 1 2 x\n1 Q0 d0 2 {text or 'x'} x\n")
        with pytest.raises(DataError, match=f"test.tsv:2: the score is '{text or 'x'}'; expected a finite number"):
            read_run(file)
    file.write_text("1\ta\t-1\n1\tb\t+2.50\n1\tc\t1e1\n1\td\t.5\n1\te\t2. \n")
    assert [grade for *_, grade in judgments(file)] == [-1, 2.5, 10, 0.5, 2]


def test_a_header_may_have_other_names_and_another_order(tmp_path):
    file = tmp_path / "test.tsv"
    for header in ("query_id\tdoc_id\trelevance", "qid\tpid\tlabel", "Query-ID\tCorpus-ID\tScore"):
        file.write_text(f"{header}\n1\td0\t2\n")
        assert list(judgments(file)) == [(2, "1", "d0", 2)]
        assert read_run(file) == {"1": {"d0": 2}}
    file.write_text("\n\ncorpus-id\tscore\tquery-id\nd0\t2\t1\n")
    assert list(judgments(file)) == [(4, "1", "d0", 2)] and read_run(file) == {"1": {"d0": 2}}


def test_an_unknown_header_is_one_error_with_line_and_remedy(tmp_path):
    (tmp_path / "test.tsv").write_text("frage\ttext\tnote\n1\td0\t2\n")
    for read in (read_run, lambda path: list(judgments(path))):
        with pytest.raises(DataError, match="test.tsv:1: the .* is 'note'.*header.*query-id, corpus-id, score"):
            read(tmp_path / "test.tsv")


def test_a_repeated_query_id_is_refused(tmp_path):
    (tmp_path / "queries.jsonl").write_text('{"_id": "1", "text": "a"}\n{"_id": "1", "text": "b"}\n')
    with pytest.raises(DataError, match="queries.jsonl:2: the _id '1' was given before"):
        query_texts(tmp_path / "queries.jsonl")


def test_a_title_stands_before_the_body_and_must_be_a_string():
    assert document_text({"title": "a", "text": "b"}, "f:1") == "a b"
    assert document_text({"title": None, "text": "b"}, "f:1") == document_text({"title": "", "text": "b"}, "f:1") == "b"
    with pytest.raises(DataError, match="f:1: title is the number 0; expected a string"):
        document_text({"title": 0, "text": "b"}, "f:1")


@pytest.fixture
def toy(tmp_path):
    return write_toy(tmp_path / "toy")


@pytest.mark.parametrize("ending", ["", ".gz"])
def test_plain_and_gzip_files_are_read_alike(tmp_path, ending):
    root = write_toy(tmp_path, ending)
    folder = read_folder(root)
    assert folder.queries["q3"] == "where is planet 3"
    assert folder.documents["d3-1"] == "planet planet text 1"  # title, space, text
    assert folder.documents["d3-0"] == "planet text 0"  # no title, no space
    assert read_qrels(folder, "test") == {f"q{query}": {f"d{query}-0": 1} for query in range(8, 12)}


def test_a_folder_has_a_pool_only_where_it_lists_candidates(toy):
    assert read_pool(read_folder(toy), "test") is None
    write(toy / "candidates.test.tsv.gz", "query-id\tcorpus-id\nq8\td8-4\nq8\td8-0\n")
    assert read_pool(read_folder(toy), "test") == {"q8": ["d8-4", "d8-0"]}


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("qrels/test.tsv", "q8\td8-0\n", r"test.tsv:1: found 2 columns.*expected query-id, corpus-id, score"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq99\td8-0\t1\n", "test.tsv:2: .*no query 'q99'"),
        ("qrels/test.tsv", "q8\td8-0\t0.5\n", "test.tsv:1: the grade is 0.5; expected a whole number"),
        ("qrels/test.tsv", "q8\td8-0\t1e20\n", "test.tsv:1: the grade is 1e\\+20; expected a whole number of at most"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "test.tsv: found no judgments"),
        ("corpus.jsonl", '{"_id": "d"}\n', "corpus.jsonl:1: found no 'text' among the keys '_id'; add it"),
        ("corpus.jsonl", '{"_id": "d", "text": 5}\n', "corpus.jsonl:1: text is the number 5; expected a string"),
        ("corpus.jsonl", '{"_id": "d", "text": "", "title": [1]}\n', "corpus.jsonl:1: title is a list; expected"),
        ("corpus.jsonl", '{"_id": "d", "text": ""}\n' * 2, "corpus.jsonl:2: the _id 'd' was given before"),
        ("corpus.jsonl", "", "corpus.jsonl: found no documents"),
        ("queries.jsonl", '{"_id": "q", "text": "\\ud83d"}\n', "queries.jsonl:1: text has half of a character"),
        ("queries.jsonl", '{"_id": "q 1", "text": ""}\n', "queries.jsonl:1: _id is 'q 1'; expected a text without"),
        ("corpus.jsonl", '{"_id": "d 1", "text": ""}\n', "corpus.jsonl:1: _id is 'd 1'; expected a text"),
        ("candidates.test.tsv", "q8\td99\n", "candidates.test.tsv:1: corpus.jsonl has no document 'd99'"),
    ],
)
def test_a_bad_line_is_named_with_its_file(toy, name, text, message):
    write(toy / name, text)
    with pytest.raises(ValueError, match=message):
        folder = read_folder(toy)
        read_qrels(folder, "test")
        read_pool(folder, "test")


def test_every_unknown_query_is_named_with_its_line_and_what_to_do(toy):
    write(toy / "qrels/test.tsv", "q8\td8-0\t1\nq98\td8-0\t1\nq99\td8-0\t1\n")
    with pytest.raises(DataError) as caught:
        read_qrels(read_folder(toy), "test")
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{toy}/qrels/test.tsv:2: ") and "'q98'" in first
    assert "add it" in first and "remove" in first
    assert second.startswith(f"{toy}/qrels/test.tsv:3: ") and "'q99'" in second


def test_a_run_that_does_not_fit_the_data_is_refused(tmp_path):
    (tmp_path / "run").write_text("q1 d1 2\nq1 d7 1\nq2 d8 1\n")
    assert read_run(tmp_path / "run", ["q1"], {"d1", "d7"}) == {"q1": {"d1": 2, "d7": 1}, "q2": {"d8": 1}}
    with pytest.raises(DataError) as caught:
        read_run(tmp_path / "run", ["q1", "q2"], {"d1"})
    first, second = str(caught.value).splitlines()
    assert first.startswith(f"{tmp_path}/run:2: ") and "'d7'" in first and "'q1'" in first
    assert second.startswith(f"{tmp_path}/run:3: ") and "'d8'" in second


def test_a_missing_split_is_reported_with_those_that_exist(toy):
    with pytest.raises(ValueError, match=r"neither qrels/dev.tsv nor .* \(the splits there: test, train\); set split"):
        read_qrels(read_folder(toy), "dev")


def test_a_gzip_file_that_was_cut_is_named(toy):
    whole = gzip.compress((toy / "corpus.jsonl").read_bytes())
    (toy / "corpus.jsonl").unlink()
    (toy / "corpus.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match="corpus.jsonl.gz:.*the gzip data ends too early"):
        read_folder(toy)


def test_a_folder_without_the_layout_s_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither corpus.jsonl nor corpus.jsonl.gz; expected a folder in BEIR layout"):
        read_folder(tmp_path)


def test_a_written_run_is_read_back_to_the_last_digit(tmp_path):
    score = float(np.float32(0.1))
    run = {"查1": {"d1": score, "d2": -3.25}, "q2": {"d1": 1e-30}}
    write_run(tmp_path / "run.trec", run, "my model")
    assert read_run(tmp_path / "run.trec") == run
    assert (tmp_path / "run.trec").read_text().splitlines()[1] == "查1 Q0 d2 2 -3.25 my_model"
    assert [path.name for path in tmp_path.iterdir()] == ["run.trec"]


def test_ties_rank_by_the_greater_id_as_in_trec_eval(tmp_path):
    write_run(tmp_path / "run.trec", {"q": {"d1": 1.0, "d9": 1.0, "d10": 1.0, "d5": 2.0}}, "x")
    lines = (tmp_path / "run.trec").read_text().splitlines()
    assert [line.split()[2:4] for line in lines] == [["d5", "1"], ["d9", "2"], ["d10", "3"], ["d1", "4"]]


def test_three_columns_between_tabs_and_gzip_are_read_too(tmp_path):
    (tmp_path / "bm25.tsv.gz").write_bytes(gzip.compress(b"query-id\tcorpus-id\tscore\n7\t20\t1.5\n7\t56\t1\n"))
    assert read_run(tmp_path / "bm25.tsv.gz") == {"7": {"20": 1.5, "56": 1.0}}


def test_a_line_that_is_no_ranking_is_named(tmp_path):
    cases = [
        ("q Q0 d 1 0.5\n", r"run:1: found 5 columns; expected six"),
        ("q Q0 d 1 high x\n", "run:1: the score is 'high'; expected a finite number"),
        ("q d 1\nq d nan\n", "run:2: document 'd' stands twice|run:2: the score is 'nan'"),
        ("q d 1\nq d 2\n", "run:2: document 'd' stands twice for query 'q'"),
        ("\n", "run: found no line of a run"),
    ]
    for text, message in cases:
        (tmp_path / "run").write_text(text)
        with pytest.raises(ValueError, match=message):
            read_run(tmp_path / "run")


def test_bytes_that_are_no_text_are_named_with_their_line(tmp_path):
    (tmp_path / "run").write_bytes(b"q d 1\n\xff\xfe\n")
    with pytest.raises(ValueError, match="run:2: found the byte 0xff at column 1; expected UTF-8"):
        read_run(tmp_path / "run")


def test_a_missing_run_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=f"{tmp_path.name}: a folder; expected a TREC run file"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="gone.trec: no such file"):
        read_run(tmp_path / "gone.trec")
