"""The keys of `rag-retrieval export`."""

import pytest

from rag_retrieval import ExportConfig
from rag_retrieval.core.config_reader import ConfigError, load_config
from rag_retrieval.export.config import PushConfig


def load(*options: str) -> ExportConfig:
    return load_config(ExportConfig, None, options)


def test_a_model_and_an_output_are_enough():
    config = load("--model", "owner/model", "--output", "out")
    assert config == ExportConfig(model="owner/model", output="out")
    assert (config.quantize, config.force, config.data) == (None, False, None)


def test_a_switch_alone_is_on_and_one_with_a_value_is_what_it_says():
    assert load("--force", "--quantize", "int8", "--model", "m", "--output", "o").force
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
    assert ExportConfig(model="m", output="o", data="d", depth=5, device="cpu").ignored is None


def test_keys_of_data_in_beir_layout_and_of_int8_are_ignored_by_name_without_them(tmp_path):
    config = ExportConfig(model="m", output="o", data="d.jsonl", split="dev", force=True)
    assert "split (only for exports with data in BEIR layout)" in config.ignored
    assert "force (only for quantize int8)" in config.ignored
    given = dict(data=str(tmp_path), split="dev", quantize="int8", force=True)
    assert ExportConfig(model="m", output="o", **given).ignored is None


def test_keys_of_an_upload_are_ignored_by_name_in_a_dry_run():
    given = dict(model="m", repo_id="a/b", private=False, commit_message="x")
    ignored = PushConfig(**given, dry_run="look").ignored
    assert "private, commit_message (only for uploads" in ignored
    assert PushConfig(**given).ignored is None
