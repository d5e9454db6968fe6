"""Which values mining takes, and what each mistake is told as."""

import pytest
from pydantic import ValidationError

from rag_retrieval.core.config_file import ConfigError, load_config
from rag_retrieval.core.config_schema import describe_options
from rag_retrieval.mining.mining_config import MINING, MiningConfig


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder has a BEIR folder, a record file and a corpus, by name alone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beir").mkdir()
    for name in ("records.jsonl", "corpus.jsonl"):
        (tmp_path / name).touch()
    return tmp_path


def load(*options, text=None):
    if text is not None:
        with open("mine.yaml", "w") as file:
            file.write(text)
    return load_config(MINING, None if text is None else "mine.yaml", options)


def errors(*options, text=None):
    with pytest.raises(ConfigError) as caught:
        load(*options, text=text)
    return str(caught.value).splitlines()


BEIR = ("--data", "beir", "--output", "out.jsonl")


def test_options_alone_are_enough_and_paths_become_absolute(folder):
    config = load(*BEIR)
    assert (config.data, config.output, config.split) == (f"{folder}/beir", "out.jsonl", "train")
    assert (config.num_negatives, config.first_rank, config.last_rank, config.sampling) == (7, 1, 100, "random")


def test_a_file_is_read_and_options_win():
    config = load("--num_negatives", "2", text="data: beir\noutput: a.jsonl\nnum_negatives: 4\nrelative_margin: 5e-2\n")
    assert (config.num_negatives, config.relative_margin) == (2, 0.05)


def test_defaults_that_hang_on_other_keys():
    config = load(*BEIR, "--candidates", "dense", "--dense_model", "owner/model")
    assert (config.dense_batch_size, config.similarity, config.vector_dtype) == (32, "cosine", "float16")
    assert load(*BEIR).similarity is None
    assert load(*BEIR, "--reranker", "owner/model").absolute_margin == 0
    assert load(*BEIR, "--reranker", "owner/model", "--max_score", "0").absolute_margin is None
    assert load("--data", "records.jsonl", "--corpus", "corpus.jsonl", "--output", "o.jsonl").split is None


def test_a_configuration_can_be_made_from_another_one():
    config = load(*BEIR, "--reranker", "owner/model")
    assert MiningConfig(**config.model_dump()) == config


@pytest.mark.parametrize(
    "options, message",
    [
        ([], "--data: is missing; expected non-empty text"),
        (["--data", "nowhere"], "--data: found no file or folder nowhere; looked for {folder}/nowhere"),
        (["--output", "o.json"], "--output: expected a name that ends in .jsonl or .jsonl.gz, found o.json"),
        (["--num_negatives", "0"], "--num_negatives: expected a whole number of at least 1, found 0"),
        (["--first_rank", "0"], "--first_rank: expected a whole number of at least 1, found 0"),
        (["--first_rank", "200"], "--last_rank: expected at least first_rank, 200, found 100"),
        (
            ["--first_rank", "96"],
            "--num_negatives: ranks 96 to 100 hold 5 candidates, which cannot give 7 negatives; widen the window or "
            "ask for fewer",
        ),
        (["--relative_margin", "1"], "--relative_margin: expected a number of at least 0 and below 1, found 1"),
        (["--sampling", "best"], '--sampling: expected one of random, top, found "best"'),
        (["--num_negative", "3"], "--num_negative: unknown key; did you mean num_negatives?"),
        (["--candidates", "dense"], "--dense_model: is missing; candidates dense needs a model for the vectors"),
        (
            ["--pooling", "cls"],
            "--pooling: is only for candidates dense and fused, and candidates is bm25; remove it",
        ),
        (
            ["--corpus", "corpus.jsonl"],
            "--corpus: is only for a file of records, and data is a folder, which has its own corpus; remove it",
        ),
        (
            ["--data", "records.jsonl"],
            "--corpus: is missing; a file of records needs the documents to mine from: add corpus",
        ),
        (
            ["--data", "records.jsonl", "--corpus", "corpus.jsonl", "--split", "dev"],
            "--split: is only for a folder in BEIR layout, and data is a file; remove it",
        ),
        (
            ["--candidates", "fused", "--dense_model", "owner/model", "--relative_margin", "0.1"],
            "--relative_margin: compares scores, and fused candidates have ranks alone; add a reranker or remove this",
        ),
        (["--reranker", "./none"], "--reranker: found no folder ./none; looked for {folder}/none"),
    ],
)
def test_a_mistake_is_told_in_one_line(folder, options, message):
    given = options if "--data" in options or not options else [*BEIR[:2], *options]
    given = [*given, "--output", "o.jsonl"] if "--output" not in given else given
    assert errors(*given) == [message.format(folder=folder)]


def test_a_margin_is_fine_for_fused_candidates_that_are_reranked():
    options = ("--candidates", "fused", "--dense_model", "owner/model", "--relative_margin", "0.1")
    assert load(*BEIR, *options, "--reranker", "owner/model").relative_margin == 0.1


def test_all_mistakes_of_a_file_are_told_together():
    found = errors(text="data: beir\noutput: o.jsonl\nseed: -1\npooling: cls\nfirst_rank: 99\nlast_rank: 98\n")
    assert [line.split(": ")[0] for line in found] == ["mine.yaml:3", "mine.yaml:4", "mine.yaml:6"]


def test_an_empty_file_says_what_a_line_looks_like():
    assert errors(text="") == ["mine.yaml: is empty; expected lines such as `data: folder`"]


def test_the_function_takes_the_same_values_and_says_the_same():
    with pytest.raises(ValidationError, match="which cannot give 7 negatives"):
        MiningConfig(data="beir", output="o.jsonl", last_rank=5)


def test_help_names_every_key():
    text = describe_options(MINING)
    assert all(f"--{key}: " in text for key in MiningConfig.model_fields)
    assert "seq" not in text
