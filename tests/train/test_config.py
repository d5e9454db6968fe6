"""The keys that every trainer has: ranges, spellings, what depends on what, what does not apply."""

import math

import pytest
import yaml
from pydantic import ValidationError

from rag_retrieval.train.config import Only, TrainingConfig, key

REQUIRED = {"model_name_or_path": "owner/model", "output_dir": "out"}


class SecondTrainer(TrainingConfig):
    """What another trainer would add."""

    dim: int = key("Width of a vector.", 64, ge=1)
    teacher: str | None = key("Another model.")
    teacher_dim: int | None = key(
        "Its width.", only=Only("runs with a teacher", lambda config: config.teacher), derive=lambda config: config.dim)


def wrong_keys(config_class=TrainingConfig, **changes) -> set[str]:
    with pytest.raises(ValidationError) as caught:
        config_class(**REQUIRED | changes)
    return {entry["loc"][0] for entry in caught.value.errors()}


def test_another_trainer_adds_its_keys_with_what_they_depend_on():
    assert SecondTrainer(**REQUIRED).teacher_dim is None
    assert SecondTrainer(**REQUIRED, teacher="t", dim=8).teacher_dim == 8
    config = SecondTrainer(**REQUIRED, teacher_dim=8, lr=1e-3)
    assert (config.teacher_dim, config.head_lr) == (None, 1e-2)
    assert "teacher_dim" in config.ignored and "a teacher" in config.ignored


def test_defaults_follow_the_keys_that_they_depend_on():
    assert TrainingConfig(**REQUIRED, lr=2e-5).head_lr == pytest.approx(2e-4)
    assert TrainingConfig(**REQUIRED, lr=2e-5, head_lr=1e-3).head_lr == 1e-3
    config = TrainingConfig(**REQUIRED, lora_r=8)
    assert (config.lora_alpha, config.lora_dropout, config.lora_target_modules) == (16, 0.0, None)
    assert config.fine_tune_type == "lora" and TrainingConfig(**REQUIRED).fine_tune_type == "sft"
    assert TrainingConfig(**REQUIRED, fine_tune_type="lora").lora_r == 8
    assert TrainingConfig(**REQUIRED, fine_tune_type="bitfit", lora_r=4).lora_r is None
    assert TrainingConfig(**REQUIRED, val_dataset="owner/data").val_split == "validation"
    assert TrainingConfig(**REQUIRED, val_dataset="v.jsonl").val_split is None


def test_keys_that_do_not_apply_are_dropped_and_named_in_one_line():
    given = {"lora_alpha": 8, "lora_dropout": 0.1, "lora_target_modules": "all-linear", "eval_steps": 5,
             "eval_on_start": True, "early_stopping_patience": 2, "val_split": "dev",
             "resume_with_changes": True}  # fmt: skip
    config = TrainingConfig(**REQUIRED, **given)
    assert config.model_dump() == TrainingConfig(**REQUIRED).model_dump()
    assert len(config.ignored.splitlines()) == 1
    for name in given:
        assert name in config.ignored
    assert TrainingConfig(**REQUIRED, val_dataset="d", lora_r=2, resume="auto", **given).ignored is None
    assert TrainingConfig(**REQUIRED, eval_on_start=False, eval_steps=None, lora_alpha="None").ignored is None


@pytest.mark.parametrize("absent", [None, "None", "none"])
def test_none_means_absent_for_every_key_but_max_grad_norm(absent):
    values = dict.fromkeys(TrainingConfig.model_fields.keys() - REQUIRED.keys() - {"max_grad_norm"}, absent)
    assert TrainingConfig(**REQUIRED, **values) == TrainingConfig(**REQUIRED)
    assert TrainingConfig(**REQUIRED, max_grad_norm=absent).max_grad_norm is None
    assert wrong_keys(**dict.fromkeys(REQUIRED, absent)) == REQUIRED.keys()


def test_the_spellings_of_existing_files_are_understood():
    assert TrainingConfig(**REQUIRED, save_on_epoch_end=0).save_on_epoch_end is False
    assert TrainingConfig(**REQUIRED, save_on_epoch_end=1).save_on_epoch_end is True
    assert TrainingConfig(**REQUIRED, epoch=3).epochs == 3
    assert wrong_keys(epoch=3, epochs=3) <= {"epoch", "epochs"}


def test_wrong_types_and_values_outside_the_range_are_refused():
    wrong = {
        "batch_size": ["many", 2.5, 0, -1, [3]],
        "epochs": [1.5, 0],
        "gradient_accumulation_steps": [0],
        "seed": [-1],
        "num_workers": [-1],
        "freeze_layers": [-1],
        "lora_r": [0],
        "lora_alpha": [0],
        "lora_dropout": [-0.1, 1],
        "lora_target_modules": [[], [1], "", 3],
        "save_steps": [0],
        "eval_steps": [0],
        "log_interval": [0],
        "num_max_checkpoints": [0],
        "early_stopping_patience": [0],
        "lr": [0, -1e-5, math.nan, math.inf],
        "head_lr": [0],
        "weight_decay": [-0.1, math.inf],
        "adam_beta1": [1, -0.1],
        "adam_beta2": [1],
        "adam_epsilon": [0],
        "max_grad_norm": [0, -1],
        "warmup_proportion": [-0.1, 1.1],
        "stable_proportion": [-0.1, 1.1],
        "save_on_epoch_end": ["often", 2],
        "mixed_precision": ["fp32", True],
        "log_with": ["mlflow"],
        "output_dir": ["", 2024],
        "btach_size": [3],
    }
    for name, values in wrong.items():
        for value in values:
            assert wrong_keys(**{name: value}) == {name}, (name, value)


def test_all_wrong_values_come_at_once():
    assert wrong_keys(lr=-1, seed="x", nothing=None) == {"lr", "seed", "nothing"}


def test_warmup_and_stable_may_fill_the_schedule_but_no_more():
    TrainingConfig(**REQUIRED, warmup_proportion=0.9, stable_proportion=0.1)
    assert 0.15 + 0.85 + 1e-12 > 1
    TrainingConfig(**REQUIRED, warmup_proportion=0.15, stable_proportion=0.85 + 1e-12)
    assert wrong_keys(warmup_proportion=0.6, stable_proportion=0.5) == {"stable_proportion"}


def test_a_configuration_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError):
        TrainingConfig(**REQUIRED).lr = 1.0


def test_the_written_yaml_shows_resolved_values_that_any_yaml_reader_understands():
    config = TrainingConfig(**REQUIRED | {"output_dir": "1e5"}, lora_r=4, lora_target_modules=["q", "v"])
    written = yaml.safe_load(config.to_yaml())
    assert written["lr"] == 5e-5 and written["head_lr"] == 5e-4 and written["lora_alpha"] == 8
    assert written["output_dir"] == "1e5" and written["mixed_precision"] == "no"
    assert list(written) == list(TrainingConfig.model_fields)
