"""Which values mining takes, and how each mistake is reported."""

import pytest
from pydantic import ValidationError

from rag_retrieval.core.config_reader import ConfigError, load_config
from rag_retrieval.mining.config import MiningConfig


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
    return load_config(MiningConfig, None if text is None else "mine.yaml", options)


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
    "options, key, named",
    [
        (["--data", "nowhere"], "data", "{folder}/nowhere"),
        (["--output", "o.json"], "output", ".jsonl.gz"),
        (["--first_rank", "200"], "last_rank", "200"),
        (["--first_rank", "96"], "num_negatives", "5 candidates"),
        (["--relative_margin", "1"], "relative_margin", "below 1"),
        (["--sampling", "best"], "sampling", "random, top"),
        (["--num_negative", "3"], "num_negative", "num_negatives"),
        (["--candidates", "dense"], "dense_model", "is missing"),
        (["--candidates", "fused", "--dense_model", "o/m", "--relative_margin", "0.1"], "relative_margin", "relevance"),
        (["--reranker", "./none"], "reranker", "{folder}/none"),
        (["--candidates", "words"], "candidates", "bm25, dense, lexical, multi_vector, fused, random, found words"),
        (["--candidates", "random", "--absolute_margin", "0"], "absolute_margin", "say nothing of relevance"),
        (["--reranker", "o/m", "--guide", "o/m"], "guide", "and so is reranker"),
        (["--candidates", "random", "--labels", "score"], "labels", "add a reranker or a guide"),
        (["--range_for_sampling", "10"], "range_for_sampling", "such as 2-200"),
        (["--range_for_sampling", "0-9", "--first_rank", "2"], "range_for_sampling", "keep one"),
        (["--range_for_sampling", "5-5"], "last_rank", "expected at least first_rank, 6, found 5"),
        (["--data", "records.jsonl", "--corpus", "corpus.jsonl", "--index", "beir"], "corpus", "give one of them"),
    ],
)
def test_a_mistake_is_one_line_that_names_key_and_cause(folder, options, key, named):
    given = options if "--data" in options else [*BEIR[:2], *options]
    (line,) = errors(*given, *([] if "--output" in given else ["--output", "o.jsonl"]))
    assert line.startswith(f"--{key}: ") and named.format(folder=folder) in line


def test_keys_that_do_not_apply_are_ignored_by_name():
    config = load(*BEIR, "--pooling", "cls", "--corpus", "corpus.jsonl")
    assert (config.pooling, config.corpus) == (None, None)
    assert "pooling (only for candidates dense and fused without index)" in config.ignored
    assert "corpus" in config.ignored
    records = ("--data", "records.jsonl", "--corpus", "corpus.jsonl", "--output", "o.jsonl")
    assert load(*records).ignored is None and "split" in load(*records, "--split", "dev").ignored


def test_a_seed_and_an_overlap_that_nothing_reads_are_ignored_by_name():
    dense = ("--candidates", "dense", "--dense_model", "owner/model", "--sampling", "top", "--seed", "5")
    assert "seed (only for" in load(*BEIR, *dense).ignored
    assert load(*BEIR, *dense, "--faiss_index", "IVF4,Flat").ignored is None
    assert load(*BEIR, "--seed", "5").ignored is None
    assert "overlap (only for" in load(*BEIR, "--reranker", "owner/model", "--overlap", "5").ignored
    slices = ("--long_document", "max_slice", "--overlap", "5")
    assert load(*BEIR, "--reranker", "owner/model", *slices).ignored is None
    assert "overlap" in load(*BEIR, *slices).ignored


def test_a_margin_is_fine_for_fused_candidates_that_are_reranked():
    options = ("--candidates", "fused", "--dense_model", "owner/model", "--relative_margin", "0.1")
    assert load(*BEIR, *options, "--reranker", "owner/model").relative_margin == 0.1


def test_all_mistakes_of_a_file_come_together():
    found = errors(text="data: beir\noutput: o.csv\nseed: -1\npooling: max\n")
    assert [line.split(": ")[0] for line in found] == ["mine.yaml:2", "mine.yaml:3", "mine.yaml:4"]
    found = errors(text="data: beir\noutput: o.jsonl\ncandidates: dense\nfirst_rank: 99\nlast_rank: 98\n")
    assert [line.split(": ")[:2] for line in found] == [["mine.yaml:5", "last_rank"], ["mine.yaml", "dense_model"]]


def test_the_function_takes_the_same_values_and_says_the_same():
    with pytest.raises(ValidationError, match="which cannot give 7 negatives"):
        MiningConfig(data="beir", output="o.jsonl", last_rank=5)


def test_options_of_a_model_are_ignored_by_name_without_one():
    values = {"max_length": 128, "long_document": "max_slice", "device": "cpu"}
    config = MiningConfig(data="beir", output="o.jsonl", **values)
    assert "long_document (only for runs with a reranker)" in config.ignored and "device" in config.ignored
    assert "max_length (only for runs with a reranker or a guide)" in config.ignored
    assert (config.max_length, config.long_document, config.device) == (None, "truncate", None)
    assert MiningConfig(data="beir", output="o.jsonl", reranker="m", **values).ignored is None
    dense = MiningConfig(data="beir", output="o.jsonl", candidates="dense", dense_model="m", device="cpu")
    assert dense.ignored is None and dense.device == "cpu"


def test_flagembeddings_command_runs_with_its_own_names(folder):
    """Its ranks count from 0 and leave the end out: [2:200] are ranks 3 to 200."""
    options = "--input_file records.jsonl --output_file mined.jsonl --range_for_sampling 2-200 --negative_number 15"
    options += " --candidate_pool corpus.jsonl --embedder_name_or_path owner/model --use_gpu_for_searching"
    config = load(*options.split())
    assert (config.data, config.corpus) == (f"{folder}/records.jsonl", f"{folder}/corpus.jsonl")
    assert (config.output, config.num_negatives, config.dense_model) == ("mined.jsonl", 15, "owner/model")
    assert (config.first_rank, config.last_rank, config.candidates) == (3, 200, "dense")
    assert config.ignored.count("only for") == 1 and "use_gpu_for_searching" in config.ignored


def test_an_index_has_the_documents_and_the_searches(folder):
    """Its searches may have any name; how words and vectors are made is its own affair."""
    config = load("--data", "records.jsonl", "--output", "o.jsonl", "--index", "beir")
    assert (config.index, config.candidates, config.language) == (f"{folder}/beir", "fused", None)
    options = ("--candidates", "lexical", "--dense_model", "owner/model", "--language", "german")
    config = load("--data", "records.jsonl", "--output", "o.jsonl", "--index", "beir", *options)
    assert (config.candidates, config.dense_model) == ("lexical", None)
    assert "dense_model" in config.ignored and "language" in config.ignored


def test_a_guide_decides_on_margins_as_a_reranker_does():
    assert load(*BEIR, "--guide", "owner/model").absolute_margin == 0
    assert load(*BEIR, "--guide", "owner/model", "--relative_margin", "0.05").absolute_margin is None
    fused = ("--candidates", "fused", "--dense_model", "owner/model", "--relative_margin", "0.05", "--device", "cpu")
    assert load(*BEIR, "--guide", "owner/model", "--max_length", "64", "--dtype", "bf16").ignored is None
    assert "query_format" in load(*BEIR, *fused, "--guide", "owner/model", "--query_format", "{}").ignored
    assert load(*BEIR, *fused, "--guide", "owner/model").ignored is None
    assert load(*BEIR, "--candidates", "random", "--sampling", "top", "--seed", "3").ignored is None
