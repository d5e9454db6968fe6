"""The options of `rag-retrieval export`, and mistakes in them told before anything is loaded."""

import pytest

from rag_retrieval.core.config_file import ConfigError, load_config
from rag_retrieval.export.export_command import main, switched_on
from rag_retrieval.export.export_config import EXPORTING, ExportConfig


def load(*options: str) -> ExportConfig:
    return load_config(EXPORTING, None, options)


def test_a_model_and_an_output_are_enough():
    config = load("--model", "owner/model", "--output", "out")
    assert config == ExportConfig(model="owner/model", output="out")
    assert (config.quantize, config.force, config.data) == (None, False, None)


def test_all_mistakes_come_at_once(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConfigError) as caught:
        load("--model", "./gone", "--quantize", "int4", "--data", "none.jsonl", "--opset", "18")
    assert str(caught.value).splitlines() == [
        f"--model: found no folder ./gone; looked for {tmp_path / 'gone'}",
        '--quantize: expected one of int8, found "int4"',
        f"--data: found no file or folder none.jsonl; looked for {tmp_path / 'none.jsonl'}",
        "--opset: unknown key; --help lists all keys",
        "--output: is missing; expected non-empty text",
    ]


def test_a_switch_alone_is_on_and_one_with_a_value_is_what_it_says():
    options = ["--force", "--model", "m", "--output", "o"]
    assert switched_on(options) == ["--force=true", "--model", "m", "--output", "o"]
    assert load(*switched_on(options)).force
    assert not load(*switched_on(["--force", "false", "--model", "m", "--output", "o"])).force


def test_a_wrong_option_ends_the_command_with_2_and_help_lists_every_key(capsys):
    assert main(["--model", "owner/model", "--output", "out", "--quantize", "int4"]) == 2
    assert 'error: --quantize: expected one of int8, found "int4"' in capsys.readouterr().err
    assert main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert all(f"--{key}:" in printed for key in ExportConfig.model_fields)
