import gzip

import numpy as np
import pytest

from rag_retrieval.data.run_files import read_run, trec_order, write_run


def test_a_written_run_is_read_back_to_the_last_digit(tmp_path):
    score = float(np.float32(0.1))
    run = {"查1": {"d1": score, "d2": -3.25}, "q2": {"d1": 1e-30}}
    write_run(tmp_path / "run.trec", run, "my model")
    assert read_run(tmp_path / "run.trec") == run
    assert (tmp_path / "run.trec").read_text().splitlines()[1] == "查1 Q0 d2 2 -3.25 my_model"
    assert [path.name for path in tmp_path.iterdir()] == ["run.trec"]


def test_ranks_go_by_score_and_then_by_the_greater_id_as_trec_eval_has_it(tmp_path):
    write_run(tmp_path / "run.trec", {"q": {"d1": 1.0, "d9": 1.0, "d10": 1.0, "d5": 2.0}}, "x")
    lines = (tmp_path / "run.trec").read_text().splitlines()
    assert [line.split()[2:4] for line in lines] == [["d5", "1"], ["d9", "2"], ["d10", "3"], ["d1", "4"]]


def test_scores_that_differ_beyond_float32_count_as_equal():
    assert trec_order({"a": 16777217.0, "b": 16777216.0}) == ["b", "a"]


def test_three_columns_between_tabs_and_gzip_are_read_too(tmp_path):
    (tmp_path / "bm25.tsv.gz").write_bytes(gzip.compress(b"query-id\tcorpus-id\tscore\n7\t20\t1.5\n7\t56\t1\n"))
    assert read_run(tmp_path / "bm25.tsv.gz") == {"7": {"20": 1.5, "56": 1.0}}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("q Q0 d 1 0.5\n", r"run:1: found 5 columns; expected six"),
        ("q Q0 d 1 high x\n", "run:1: the score is 'high'; expected a finite number"),
        ("q d 1\nq d nan\n", "run:2: document 'd' stands twice|run:2: the score is 'nan'"),
        ("q d 1\nq d 2\n", "run:2: document 'd' stands twice for query 'q'"),
        ("\n", "run: found no line of a run"),
    ],
)
def test_a_line_that_is_no_ranking_is_named(tmp_path, text, message):
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
