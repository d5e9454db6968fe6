import gzip

import pytest
from beir_samples import write, write_toy

from rag_retrieval.data.beir_folder import read_folder, read_pool, read_qrels


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
        ("qrels/test.tsv", "q8\td8-0\n", r"test.tsv:1: found 2 columns.*expected query-id, corpus-id, grade"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\nq99\td8-0\t1\n", "test.tsv:2: .*no query 'q99'"),
        ("qrels/test.tsv", "q8\td8-0\t0.5\n", "test.tsv:1: the grade is 0.5; expected a whole number"),
        ("qrels/test.tsv", "q8\td8-0\t1e20\n", "test.tsv:1: the grade is 1e\\+20; expected a whole number of at most"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "test.tsv: found no judgments"),
        ("corpus.jsonl", '{"_id": "d"}\n', "corpus.jsonl:1: found no 'text' among the keys '_id'; add it"),
        ("corpus.jsonl", '{"_id": "d", "text": 5}\n', "corpus.jsonl:1: text is 5; expected a string"),
        ("corpus.jsonl", '{"_id": "d", "text": "", "title": [1]}\n', "corpus.jsonl:1: title is .1.; expected a string"),
        ("corpus.jsonl", '{"_id": "d", "text": ""}\n' * 2, "corpus.jsonl:2: the _id 'd' was given before"),
        ("corpus.jsonl", "", "corpus.jsonl: found no documents"),
        ("queries.jsonl", '{"_id": "q", "text": "\\ud83d"}\n', "queries.jsonl:1: text has half of a character"),
        ("queries.jsonl", '{"_id": "q 1", "text": ""}\n', "queries.jsonl: _id is 'q 1'; expected a text without"),
        (
            "corpus.jsonl",
            '{"_id": "d 1", "text": ""}\n',
            "corpus.jsonl:1: _id is 'd 1'; expected a text",
        ),
        ("candidates.test.tsv", "q8\td99\n", "candidates.test.tsv:1: corpus.jsonl has no document 'd99'"),
    ],
)
def test_a_bad_line_is_named_with_its_file(toy, name, text, message):
    write(toy / name, text)
    with pytest.raises(ValueError, match=message):
        folder = read_folder(toy)
        read_qrels(folder, "test")
        read_pool(folder, "test")


def test_a_split_that_is_missing_is_told_with_those_that_are_there(toy):
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
