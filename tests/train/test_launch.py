"""What accelerate's settings and the machine may be, and what is made of them. Real launches: test_engines.py."""

import os

import pytest
import torch

from rag_retrieval.train.config import TrainingConfig
from rag_retrieval.train.launch import (
    LaunchError,
    adapt_to_cpu,
    build_accelerator,
    check_deepspeed,
    check_fsdp_version,
    check_one_group,
    check_precision,
    check_wrapped_layers,
    own_accumulation,
    set_up_deepspeed,
)

NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without an accelerator")


def configured(output_dir="out", **keys) -> TrainingConfig:
    return TrainingConfig(**{"model_name_or_path": "a/model", "output_dir": str(output_dir), "batch_size": 8} | keys)



def test_precision_of_launcher_and_configuration_must_agree(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(LaunchError, match="mixed_precision is bf16 in the training configuration but fp16"):
        check_precision("bf16")
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    check_precision("bf16")


def test_a_launcher_that_says_no_leaves_precision_to_the_configuration(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    check_precision("bf16")


@NO_GPU
def test_fp16_needs_a_gpu():
    with pytest.raises(LaunchError, match="fp16 needs a GPU"):
        check_precision("fp16")


def test_separate_copies_are_refused(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(LaunchError, match="started 2 processes but accelerate sees 1"):
        check_one_group(1)
    check_one_group(2)


def test_a_launcher_that_started_one_of_several_processes_is_refused(monkeypatch):
    for name in ("WORLD_SIZE", "MASTER_ADDR", "ACCELERATE_DYNAMO_BACKEND"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    check_one_group(1)  # set by a cluster, not by accelerate
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")
    with pytest.raises(LaunchError, match=r"several processes .* started one.*config/ddp.yaml"):
        check_one_group(1)
    monkeypatch.setenv("WORLD_SIZE", "2")
    check_one_group(2)


def test_accumulation_of_launcher_and_configuration_must_agree_and_the_loop_alone_divides(monkeypatch, tmp_path):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    with pytest.raises(LaunchError, match="gradient_accumulation_steps is 2 in the training .* but 4 in accelerate"):
        build_accelerator(configured(tmp_path, gradient_accumulation_steps=2))
    accelerator = build_accelerator(configured(tmp_path, gradient_accumulation_steps=4))
    assert accelerator.gradient_accumulation_steps == 1


@pytest.mark.parametrize("said", [None, "1", "auto"])
def test_a_launcher_that_says_nothing_of_accumulation_leaves_it_to_the_configuration(monkeypatch, said):
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", raising=False)
    if said:
        monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", said)
    own_accumulation(4)
    assert os.environ.get("ACCELERATE_GRADIENT_ACCUMULATION_STEPS") == said


DEEPSPEED_DEFAULTS = {"train_micro_batch_size_per_gpu": "auto", "gradient_accumulation_steps": 1}


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"gradient_clipping": 0.5}, r"max_grad_norm \(gradient_clipping\) is 1.0 .* but 0.5"),
        ({"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 2 .* but 4"),
        ({"train_micro_batch_size_per_gpu": 16}, r"batch_size \(train_micro_batch_size_per_gpu\) is 8 .* but 16"),
        ({"bf16": {"enabled": True}}, "mixed_precision is no .* but bf16"),
        ({"fp16": {"enabled": True}}, "mixed_precision is no .* but fp16"),
    ],
)
def test_deepspeed_settings_that_contradict_the_configuration_are_refused(settings, message):
    with pytest.raises(LaunchError, match=message):
        check_deepspeed(DEEPSPEED_DEFAULTS | settings, configured(gradient_accumulation_steps=2))


def test_deepspeed_settings_that_agree_or_say_nothing_are_accepted():
    agreeing = {
        "train_micro_batch_size_per_gpu": 8,
        "gradient_accumulation_steps": 2,
        "gradient_clipping": 1.0,
        "bf16": {"enabled": True},
        "fp16": {"enabled": False},
    }
    for config in (DEEPSPEED_DEFAULTS, DEEPSPEED_DEFAULTS | {"gradient_clipping": "auto"}, agreeing):
        check_deepspeed(config, configured(mixed_precision="bf16", gradient_accumulation_steps=2))
    check_deepspeed(DEEPSPEED_DEFAULTS | {"gradient_clipping": 0.0}, configured(max_grad_norm=None))


def test_layers_of_another_family_are_refused_with_the_model_s_own(monkeypatch, load_tiny):
    monkeypatch.setenv("FSDP_TRANSFORMER_CLS_TO_WRAP", "BertEmbeddings,BertLayer")
    check_wrapped_layers(load_tiny("bert").model)
    problem = "a Qwen2ForSequenceClassification has no BertEmbeddings and no BertLayer; its own are Qwen2DecoderLayer"
    with pytest.raises(LaunchError, match=problem):
        check_wrapped_layers(load_tiny("qwen2").model)
    monkeypatch.delenv("FSDP_TRANSFORMER_CLS_TO_WRAP")
    check_wrapped_layers(load_tiny("qwen2").model)


def test_fsdp1_is_refused_with_the_name_of_a_file_for_fsdp2(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.delenv("FSDP_VERSION", raising=False)
    with pytest.raises(LaunchError, match="fsdp_version: 2 .* config/default_fsdp.yaml"):
        check_fsdp_version()
    monkeypatch.setenv("FSDP_VERSION", "2")
    check_fsdp_version()


def test_without_an_accelerator_fsdp_becomes_data_parallelism(monkeypatch, caplog):
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "false")
    assert adapt_to_cpu() is None
    assert os.environ["ACCELERATE_USE_FSDP"] == "false" and os.environ["ACCELERATE_USE_CPU"] == "true"
    assert "instead of FSDP" in caplog.text


def test_without_an_accelerator_deepspeed_talks_over_gloo(monkeypatch):
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    assert adapt_to_cpu() == "gloo"


def test_deepspeed_is_set_to_clip_gather_and_keep_float32_weights():
    config = {"zero_optimization": {"stage": 3}, "gradient_clipping": "auto", "bf16": {"enabled": True}}
    set_up_deepspeed(config, configured(max_grad_norm=0.5))
    assert config["gradient_clipping"] == 0.5 and config["gradient_accumulation_steps"] == 1
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    assert config["bf16"] == {"enabled": False} and config["torch_autocast"]["dtype"] == "bfloat16"
    set_up_deepspeed(config, configured(max_grad_norm=None))
    assert config["gradient_clipping"] == 0.0
