import pytest
from beir_samples import write, write_toy

from rag_retrieval.evaluate.beir_folder import read_folder, read_pool, read_qrels


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
        ("qrels/test.tsv", "q8\td8-0\t0.5\n", "test.tsv:1: the grade is '0.5'; expected a whole number"),
        ("qrels/test.tsv", "query-id\tcorpus-id\tscore\n", "test.tsv: found no judgments"),
        ("corpus.jsonl", '{"_id": "d"}\n', "corpus.jsonl:1: expected a JSON object"),
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


def test_a_folder_without_the_layout_s_files_is_refused(tmp_path):
    with pytest.raises(ValueError, match="neither corpus.jsonl nor corpus.jsonl.gz; expected a folder in BEIR layout"):
        read_folder(tmp_path)
