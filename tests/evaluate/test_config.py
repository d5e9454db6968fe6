"""The keys of `rag-retrieval evaluate`: what names a path and what a word."""

import pytest

from rag_retrieval import EvaluationConfig, RetrievalEvaluationConfig
from rag_retrieval.core.config_reader import ConfigError, load_config

NEEDED = ["--model", "owner/model", "--data", "beir"]
DEFAULT_MEASURES = EvaluationConfig(model="m", data="d").measures


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """The current folder holds data, and files and folders with the names of words and splits."""
    monkeypatch.chdir(tmp_path)
    for name in ("beir", "bm25", "dev", "mine"):
        (tmp_path / name).mkdir()
    (tmp_path / "dev.jsonl").touch()
    return tmp_path


def load(*options: str) -> EvaluationConfig:
    return load_config(EvaluationConfig, None, [*NEEDED, *options])


def test_options_win_over_the_file_and_paths_are_found_beside_it(folder):
    (folder / "mine" / "run.trec").touch()
    text = "model: ../mine\ndata: beir\ncandidates: run.trec\ndepth: 20\nmeasures: [map, p@3]\nprecision: no\n"
    (folder / "mine" / "eval.yaml").write_text(text)
    config = load_config(EvaluationConfig, "mine/eval.yaml", ["--depth=50", "--report", "--split", "dev"])
    assert (config.model, config.data) == (f"{folder}/mine", f"{folder}/beir")
    assert config.candidates == f"{folder}/mine/run.trec"
    assert (config.depth, config.report, config.split, config.precision) == (50, True, "dev", "fp32")
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


def test_calibrate_is_a_split_unless_it_is_written_as_a_file(folder):
    assert load("--calibrate", "dev").calibrate == "dev"
    assert load("--calibrate", "dev.jsonl").calibrate == f"{folder}/dev.jsonl"


def test_keys_without_effect_are_ignored_by_name():
    without = {
        "split": ("dev", {"data": "dev.jsonl"}),
        "ignore_identical_ids": (False, {"data": "dev.jsonl"}),
        "language": ("german", {"candidates": "dev.jsonl"}),
        "calibration_dir": ("mine", {}),
        "training_run": ("mine", {}),
        "overlap": (5, {"long_document": "first_slice"}),
        "seed": (5, {"significance": "t"}),
    }
    for name, (value, others) in without.items():
        config = EvaluationConfig(**dict(model="m", data="beir", **{name: value}) | others)
        assert f"{name} (only for" in config.ignored
    effective = dict(
        split="dev", ignore_identical_ids=False, language="german", calibrate="other", calibration_dir="mine",
        report=True, training_run="mine", long_document="mean_slice", overlap=5, seed=5,
    )  # fmt: skip
    assert EvaluationConfig(model="m", data="beir", **effective).ignored is None
    for words in ({"baseline": "bm25"}, {"calibrate": "other"}):
        config = EvaluationConfig(model="m", data="beir", candidates="dev.jsonl", language="german", **words)
        assert config.ignored is None


def test_listwise_keys_and_those_of_pairs_exclude_each_other():
    config = EvaluationConfig(model="m", data="beir", window=5, step=2, passage_tokens=9, prompt_language="zh")
    assert "window, step, passage_tokens, prompt_language (only for runs with listwise)" in config.ignored
    given = dict(max_length=9, precision="bf16", batch_size=9, calibrate="dev", long_document="max_slice")
    config = EvaluationConfig(model="m", data="beir", listwise=True, window=5, step=2, device="cpu", **given)
    assert all(name in config.ignored for name in given) and "device" not in config.ignored
    with pytest.raises(ValueError, match="at most window"):
        EvaluationConfig(model="m", data="beir", listwise=True, window=5, step=6)


def test_a_mistake_names_its_key_and_value(folder):
    for key, value, named in (
        ("measures", "ndgc@10", "ndgc@10"),
        ("measures", "[]", "at least one"),
        ("data", "gone", f"no file or folder gone; looked for {folder}/gone"),
        ("model", "./gone", "no folder ./gone"),
        ("baseline", "./gone", "no file or folder ./gone"),
        ("calibrate", "gone.jsonl", "no file gone.jsonl"),
    ):
        with pytest.raises(ConfigError) as error:
            load(f"--{key}", value)
        assert str(error.value).startswith(f"--{key}") and named in str(error.value)


# ---- retrievers


def of_retrievers(**options) -> RetrievalEvaluationConfig:
    return RetrievalEvaluationConfig(**{"retriever": "owner/model", "data": "beir"} | options)


def test_keys_of_retrievers_that_do_not_apply_are_named(folder):
    for given, named in (
        (dict(retriever="bm25", pooling="cls", faiss_index="Flat"), ("pooling", "faiss_index")),
        (dict(language="german"), ("language",)),
        (dict(retriever="bm25,owner/m", query_model="owner/a", corpus_embeddings="v"), ("query_model", "corpus_e")),
        (dict(long_document="max_slice"), ("long_document",)),
        (dict(data="dev.jsonl", depth=5, report=True, reranker="owner/r"), ("depth", "report", "reranker")),
        (dict(data="dev.jsonl", query_model="owner/a", faiss_index="Flat"), ("query_model", "faiss_index")),
    ):
        ignored = of_retrievers(**given).ignored
        assert all(name in ignored for name in named), (given, ignored)
    effective = dict(pooling="cls", query_model="owner/a", reranker="owner/r", long_document="max_slice", dtype="bf16")
    assert of_retrievers(**effective).ignored is None
    assert of_retrievers(retriever="bm25", reranker="owner/r", language="german", precision="bf16").ignored is None


def test_retrievers_are_names_between_commas_and_paths_are_found(folder):
    options = ["--retriever", "bm25,mine,owner/model", "--data", "beir"]
    assert load_config(RetrievalEvaluationConfig, None, options).retriever == ("bm25", f"{folder}/mine", "owner/model")


def test_mistakes_of_retrievers_name_their_key(folder):
    for options, named in (
        (["--data", "beir"], "--retriever: a name is missing"),
        (["--retriever", "bm25,", "--data", "beir"], "--retriever: a name is missing"),
        (["--retriever", "bm25,bm25", "--data", "beir"], "--retriever: the same twice"),
        (["--retriever", "./gone", "--data", "beir"], "found no file or folder ./gone"),
        (["--retriever", "bm25", "--data", "beir", "--depth", "20", "--measures", "recall@50"], "--depth: is 20"),
        (["--retriever", "bm25", "--data", "dev.jsonl"], "--retriever: cannot compare the two texts of a pair"),
    ):
        with pytest.raises(ConfigError, match=named):
            load_config(RetrievalEvaluationConfig, None, options)
