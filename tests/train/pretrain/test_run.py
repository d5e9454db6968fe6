"""Runs of a pre-training: what is learned, validated, resumed and left behind, and what starts from it."""

import json
from pathlib import Path

import pytest
import torch
from tiny_models import CHINESE, ENGLISH
from training_runs import (
    ROOT,
    embedding_records,
    final_weights,
    plain_texts,
    read_metrics,
    train,
    write_jsonl,
    write_yaml,
)
from transformers import AutoModel, AutoModelForMaskedLM

from rag_retrieval import cli
from rag_retrieval.core.config_reader import load_config
from rag_retrieval.core.distributed import StartError
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.train.pretrain.config import PretrainConfig
from rag_retrieval.train.pretrain.model import DECODER_FILE
from rag_retrieval.train.pretrain.train_pretrain import main

TRAINER = ROOT / "rag_retrieval" / "train" / "pretrain"
FILES = sorted(path.name for path in (TRAINER / "config").glob("*.yaml"))
KINDS = ("retromae", "span_pairs")


@pytest.mark.parametrize("name", FILES)
def test_a_shipped_configuration_is_valid_from_any_folder_and_trains(name, tmp_path, monkeypatch, bert):
    for folder in (ROOT, tmp_path, TRAINER):
        monkeypatch.chdir(folder)
        config = load_config(PretrainConfig, str(TRAINER / "config" / name))
        assert all(Path(source).exists() for source in config.train_sources) and config.ignored is None
    small = write_jsonl(tmp_path / "a.jsonl", [{"text": each} for each in ENGLISH + CHINESE])
    options = ["--model_name_or_path", bert, "--train_dataset", small, "--output_dir", str(tmp_path / "run")]
    assert main(["--config", name, *options, "--batch_size", "8", "--num_workers", "0"]) == 0
    assert {"model", "metrics.jsonl", "training_config.yaml"} <= {path.name for path in (tmp_path / "run").iterdir()}
    assert config.loss_type in (tmp_path / "run" / "model" / "README.md").read_text()


def test_both_methods_ship():
    configs = [load_config(PretrainConfig, str(TRAINER / "config" / name)) for name in FILES]
    assert sorted(config.loss_type for config in configs) == sorted(KINDS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_loss_falls_on_texts_that_are_read_again_and_again(settings, kind):
    values = settings(plain_texts(16), loss_type=kind, epochs=20, lr=3e-3)
    train(values | ({"bag_of_words_weight": 1} if kind == "retromae" else {}))
    lines = read_metrics(Path(values["output_dir"]), "train")
    names = {
        "retromae": ("masked_token_loss", "decoder_loss", "bag_of_words_loss"),
        "span_pairs": ("masked_token_loss", "span_loss"),
    }[kind]
    for name in names:
        first, last = (sum(line[name] for line in part) / 6 for part in (lines[:6], lines[-6:]))
        assert last < 0.9 * first, name
    for line in lines:
        assert sum(line[name] for name in names) == pytest.approx(line["loss"], rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_a_command_pre_trains_and_an_embedder_starts_from_what_comes_out(settings, tmp_path, bert, kind):
    texts = [{"text": each} for each in ENGLISH + CHINESE]
    values = settings(texts, loss_type=kind, output_dir=str(tmp_path / "pre"), num_workers=1)
    assert cli.main(["train", "--config", write_yaml(tmp_path / "run.yaml", values)]) == 0
    model = tmp_path / "pre" / "model"
    assert not (model / DECODER_FILE).exists()
    before, after = (AutoModel.from_pretrained(folder).state_dict() for folder in (bert, model))
    unchanged = [name for name in before if torch.equal(before[name], after[name])]
    assert not [name for name in unchanged if "pooler" not in name]
    head = AutoModelForMaskedLM.from_pretrained(model).cls.predictions.transform.dense.weight
    assert torch.equal(head, final_weights(tmp_path / "pre")["cls.predictions.transform.dense.weight"])
    records = write_jsonl(tmp_path / "records.jsonl", embedding_records(8))
    train({
        "task": "embedding", "model_name_or_path": str(model), "train_dataset": records, "batch_size": 4,
        "query_max_len": 24, "passage_max_len": 48, "output_dir": str(tmp_path / "embedder"), "num_workers": 0,
    })  # fmt: skip
    assert EmbeddingModel.from_pretrained(tmp_path / "embedder" / "model").settings.pooling == "cls"


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_with_dropout_goes_on_to_the_same_bits(settings, tmp_path, bert_with_dropout, kind):
    values = settings(
        loss_type=kind, model_name_or_path=bert_with_dropout, save_steps=2, num_max_checkpoints=9, epochs=2,
        output_dir=str(tmp_path / "whole"), max_tokens_per_batch=60,
    )  # fmt: skip
    train(values)
    train(values | {"output_dir": str(tmp_path / "resumed"), "resume": str(tmp_path / "whole" / "checkpoint-4")})
    found, expected = (final_weights(tmp_path / name) for name in ("resumed", "whole"))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
    lines = [read_metrics(tmp_path / name, "train")[-1] for name in ("resumed", "whole")]
    assert lines[0]["masked_token_loss"] == lines[1]["masked_token_loss"]


def test_other_texts_or_masks_are_not_the_same_run(settings, tmp_path):
    values = settings(save_steps=2, num_max_checkpoints=9, output_dir=str(tmp_path / "whole"))
    train(values)
    resumed = values | {"resume": str(tmp_path / "whole" / "checkpoint-2"), "output_dir": str(tmp_path / "other")}
    other = write_jsonl(tmp_path / "other.jsonl", plain_texts(40, seed=1))
    with pytest.raises(StartError, match="train_dataset: was .*content"):
        train(resumed | {"train_dataset": other})
    with pytest.raises(StartError, match="decoder_mlm_probability: was 0.5, now 0.4"):
        train(resumed | {"decoder_mlm_probability": 0.4})
    with pytest.raises(StartError, match="passage_tokens: was 200, now 8"):
        train(resumed | {"passage_tokens": 8})


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_validation_texts_chooses_the_model_and_does_not_depend_on_the_cut(settings, tmp_path, kind):
    val = write_jsonl(tmp_path / "val.jsonl", plain_texts(10, seed=5))
    values = settings(loss_type=kind, val_dataset=val, eval_on_start=True, eval_steps=2)
    measured = []
    for cut in ({}, {"max_tokens_per_batch": 40}, {"batch_size": 4, "gradient_accumulation_steps": 2}):
        train(values | cut)
        measured.append(read_metrics(Path(values["output_dir"]), "eval"))
        assert [line["step"] for line in measured[-1]] == [0, 2, 4, 5]
    for lines in measured:
        for line, other in zip(lines, measured[0], strict=True):
            assert [line[name] for name in other if name != "kind"] == pytest.approx(
                [value for name, value in other.items() if name != "kind"], rel=1e-4
            )
            parts = [value for name, value in line.items() if name.endswith("_loss")]
            assert len(parts) == 2 and sum(parts) == pytest.approx(line["loss"])
    state = json.loads((Path(values["output_dir"]) / "run.json").read_text())
    best = min(measured[-1][1:], key=lambda line: line["loss"])
    assert state["model_step"] == best["step"]


def test_lora_trains_and_is_merged(settings, tmp_path, bert):
    pytest.importorskip("peft")
    values = settings(lora_r=4, lora_target_modules="all-linear", save_steps=2, output_dir=str(tmp_path / "run"))
    train(values)
    before, after = (AutoModelForMaskedLM.from_pretrained(folder) for folder in (bert, tmp_path / "run" / "model"))
    name = "bert.encoder.layer.0.attention.self.query.weight"
    assert not torch.equal(before.get_parameter(name), after.get_parameter(name))
    embeddings = "bert.embeddings.word_embeddings.weight"
    assert torch.equal(before.get_parameter(embeddings), after.get_parameter(embeddings))
    resumed = values | {"output_dir": str(tmp_path / "resumed"), "resume": str(tmp_path / "run" / "checkpoint-2")}
    train(resumed)
    found, expected = (final_weights(tmp_path / folder) for folder in ("resumed", "run"))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())


def test_what_the_data_are_and_what_is_cut_is_logged(settings, tmp_path, caplog):
    caplog.set_level("INFO", logger="rag_retrieval")
    rows = plain_texts(5)
    files = [write_jsonl(tmp_path / f"{name}.jsonl", rows) for name in "ab"]
    train(settings(rows, train_dataset=files, max_len=12, batch_size=16))
    assert "b.jsonl: 5 passages; of 5, tokens p50 " in caplog.text
    assert "of the passages have more than max_len 12 tokens" in caplog.text
    assert "a step has 16 passages and the data 10" in caplog.text
    assert "1 steps of 16 passages; 6 of them, of a further pass" in caplog.text
    card = Path(settings()["output_dir"], "model", "README.md").read_text()
    assert "- a.jsonl\n- b.jsonl" in card and str(tmp_path) not in card
