"""The keys of `rag-retrieval export`."""

import pytest

from rag_retrieval import ExportConfig
from rag_retrieval.core.config_reader import ConfigError, load_config


def load(*options: str) -> ExportConfig:
    return load_config(ExportConfig, None, options)


def test_a_model_and_an_output_are_enough():
    config = load("--model", "owner/model", "--output", "out")
    assert config == ExportConfig(model="owner/model", output="out")
    assert (config.quantize, config.force, config.data) == (None, False, None)


def test_a_switch_alone_is_on_and_one_with_a_value_is_what_it_says():
    assert load("--force", "--model", "m", "--output", "o").force
    assert not load("--force", "false", "--model", "m", "--output", "o").force


def test_all_mistakes_come_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load("--model", "./gone", "--quantize", "int4", "--data", "none.jsonl", "--opset", "18")
    assert [line.partition(":")[0] for line in str(caught.value).splitlines()] == [
        "--model", "--quantize", "--data", "--opset", "--output"
    ]  # fmt: skip


def test_what_changes_no_export_is_ignored_by_name():
    config = ExportConfig(model="m", output="o", precision="bf16", dtype="fp16", devices=["cpu"], depth=5)
    assert all(name in config.ignored for name in ("precision", "dtype", "devices", "depth"))
    assert (config.precision, config.dtype, config.devices, config.depth) == (None, None, None, 50)
    assert ExportConfig(model="m", output="o", data="d", depth=5, split="dev", device="cpu").ignored is None
