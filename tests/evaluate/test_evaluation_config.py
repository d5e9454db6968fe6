"""The keys of `rag-retrieval evaluate`: what names a path and what a word, and how mistakes are told."""

import pytest

from rag_retrieval import EvaluationConfig
from rag_retrieval.core.config_file import ConfigError, load_config
from rag_retrieval.core.config_schema import describe_options
from rag_retrieval.evaluate.evaluation_config import DEFAULT_MEASURES, EVALUATION

NEEDED = ["--model", "owner/model", "--data", "beir"]


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder holds data, and files and folders with the names of words and splits."""
    monkeypatch.chdir(tmp_path)
    for name in ("beir", "bm25", "dev", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "dev.jsonl").touch()
    return tmp_path


def load(*options: str) -> EvaluationConfig:
    return load_config(EVALUATION, None, [*NEEDED, *options])


def test_options_win_over_the_file_and_paths_are_found_beside_it(folder):
    (folder / "mine" / "run.trec").touch()
    text = "model: ../mine\ndata: beir\ncandidates: run.trec\ndepth: 20\nmeasures: [map, p@3]\nprecision: no\n"
    (folder / "mine" / "eval.yaml").write_text(text)
    config = load_config(EVALUATION, "mine/eval.yaml", ["--depth=50", "--report", "true", "--split", "dev"])
    assert (config.model, config.data) == (f"{folder}/mine", f"{folder}/beir")
    assert config.candidates == f"{folder}/mine/run.trec"
    assert (config.depth, config.report, config.split, config.precision) == (50, True, "dev", "no")
    assert config.measures == ("map", "p@3")


def test_measures_are_a_list_between_commas_and_each_stands_once():
    assert load("--measures", "map, ndcg@5,map").measures == ("map", "ndcg@5")
    assert load("--measures", "map").measures == ("map",)
    assert load("--measures", "None").measures == DEFAULT_MEASURES
    assert EvaluationConfig(model="m", data="d", measures=["p@1"]).measures == ("p@1",)


def test_bm25_is_a_word_even_where_a_folder_has_its_name():
    config = load("--candidates", "bm25", "--baseline", "bm25")
    assert (config.candidates, config.baseline) == ("bm25", "bm25")


def test_a_baseline_is_a_run_file_or_a_model(folder):
    (folder / "kept.trec").touch()
    assert load("--baseline", "kept.trec").baseline == f"{folder}/kept.trec"
    assert load("--baseline", "mine").baseline == f"{folder}/mine"
    assert load("--baseline", "package:some-model").baseline == "package:some-model"
    assert load("--baseline", "owner/other").baseline == "owner/other"


def test_what_to_calibrate_on_is_a_split_unless_it_is_written_as_a_file(folder):
    assert load("--calibrate", "dev").calibrate == "dev"
    assert load("--calibrate", "dev.jsonl").calibrate == f"{folder}/dev.jsonl"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--seeds", "3"], "--seeds: unknown key; did you mean seed?"),
        (["--depth", "0"], "--depth: expected a whole number of at least 1, found 0"),
        (["--measures", "ndgc@10"],
         "--measures: found 'ndgc@10'; expected one of ndcg@k, mrr@k, map, recall@k, p@k, err@k, such as ndcg@10, with "
         "k up to 1,000,000,000"),
        (["--measures", "[]"], "--measures: found none; expected at least one, such as ndcg@10"),
        (["--measures", "[1]"], "--measures: expected a name or a list of names, found [1]"),
        (["--report"], "--report: needs a value; expected true or false"),
        (["--data", "gone"], "--data: found no file or folder gone; looked for {folder}/gone"),
        (["--model", "./gone"], "--model: found no folder ./gone; looked for {folder}/gone"),
        (["--baseline", "./gone"], "--baseline: found no file or folder ./gone; looked for {folder}/gone"),
        (["--calibrate", "gone.jsonl"], "--calibrate: found no file gone.jsonl; looked for {folder}/gone.jsonl"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_with_its_key(folder, options, message):
    with pytest.raises(ConfigError) as error:
        load(*options)
    assert str(error.value) == message.format(folder=folder)


def test_help_has_every_key_with_what_it_takes_and_its_default():
    text = describe_options(EVALUATION)
    assert all(f"  --{key}: " in text for key in EvaluationConfig.model_fields)
    assert "  --measures: a name or a list of names [ndcg@10,mrr@10,map,recall@10,recall@100,p@10]\n" in text
