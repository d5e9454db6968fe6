import os

import pytest
import torch

from rag_retrieval.train.launch import (
    LaunchError,
    adapt_to_cpu,
    build_accelerator,
    check_one_group,
    check_precision,
    own_accumulation,
    set_up_deepspeed,
)

NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without an accelerator")


def test_precision_of_launcher_and_configuration_must_agree(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "fp16")
    with pytest.raises(LaunchError, match="mixed_precision is bf16 in the configuration but fp16"):
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


def test_accumulation_of_the_launcher_is_not_used(monkeypatch, caplog, tmp_path):
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    accelerator = build_accelerator("no", None, tmp_path, batch_size=1, max_grad_norm=1.0)
    assert accelerator.gradient_accumulation_steps == 1
    assert "the training YAML decides" in caplog.text


def test_one_accumulation_step_says_nothing(monkeypatch, caplog):
    monkeypatch.delenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", raising=False)
    own_accumulation()
    assert not caplog.text and "ACCELERATE_GRADIENT_ACCUMULATION_STEPS" not in os.environ


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


def test_deepspeed_is_told_to_clip_to_gather_and_to_keep_float32_weights():
    config = {"zero_optimization": {"stage": 3}, "gradient_clipping": "auto", "bf16": {"enabled": True}}
    set_up_deepspeed(config, batch_size=8, max_grad_norm=0.5)
    assert config["gradient_clipping"] == 0.5 and config["gradient_accumulation_steps"] == 1
    assert config["zero_optimization"]["stage3_gather_16bit_weights_on_model_save"]
    assert config["bf16"] == {"enabled": False} and config["torch_autocast"]["dtype"] == "bfloat16"
    set_up_deepspeed(config, batch_size=8, max_grad_norm=None)
    assert config["gradient_clipping"] == 0.0
