"""The typed configuration: strict types, ranges, fields that must fit each other, derived defaults."""

import math
from pathlib import Path
from typing import get_args

import pytest
import yaml
from pydantic import ValidationError

from rag_retrieval.core.config_schema import is_data_file_name
from rag_retrieval.losses import LOSSES
from rag_retrieval.train.reranker.config_checks import (
    GROUPED_LABEL_RANGES,
    LOSS_DATASET_TYPE,
    LOSS_OPTIONS,
    TEACHER_LOSSES,
)
from rag_retrieval.train.reranker.training_config import LOSS_ALIASES, TrainingConfig

POINTWISE = {
    "model_name_or_path": "owner/model",
    "model_type": "bert_encoder",
    "train_dataset": "train.jsonl",
    "train_dataset_type": "pointwise",
    "loss_type": "point_ce",
    "output_dir": "out",
}
GROUPED = POINTWISE | {"train_dataset_type": "grouped", "loss_type": "listwise_ce"}
DECODER = POINTWISE | {"model_type": "llm_decoder"}


def problems(base: dict, **changes) -> dict[str, str]:
    """Messages by key; all of them, whatever their kind."""
    with pytest.raises(ValidationError) as caught:
        TrainingConfig(**base | changes)
    return {entry["loc"][0]: entry["msg"] for entry in caught.value.errors()}


def test_a_minimal_pointwise_configuration_gets_the_documented_defaults():
    given = TrainingConfig(**POINTWISE).model_dump()
    assert given == POINTWISE | {
        "num_labels": 1, "query_format": None, "document_format": None, "seq": None, "special_token":
        None, "head": None, "instruction": None, "yes_token": None, "no_token": None,
        "max_len": 512, "attn_implementation": None, "gradient_checkpointing": False, "torch_compile": False,
        "trust_remote_code": False, "train_label_key": "label", "train_split": None, "train_group_size":
        None, "max_label": 1.0, "min_label": 0.0, "shuffle_rate": 0.0, "val_dataset": None,
        "val_dataset_type": None, "val_label_key": None, "val_split": None, "num_workers": 2,
        "temperature": None, "lambda_weights": None, "lambda_top_k": None, "teacher_loss_type": None,
        "teacher_weight": None, "teacher_temperature": None, "teacher_score_key": None,
        "epochs": 1, "batch_size": 32,
        "max_tokens_per_batch": None, "gradient_accumulation_steps": 1, "lr": 5e-5,
        "head_lr": 5e-4, "weight_decay": 0.01, "adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon":
        1e-8, "max_grad_norm": 1.0, "warmup_proportion": 0.1, "stable_proportion": 0.0, "mixed_precision":
        "no", "seed": 42, "freeze_embeddings": False, "freeze_layers": 0, "lora_r": None, "lora_alpha":
        None, "lora_dropout": None, "lora_target_modules": None, "save_on_epoch_end": True, "save_steps":
        None, "num_max_checkpoints": 3, "eval_steps": None, "eval_on_start": False,
        "metric_for_best_model": None, "early_stopping_patience": None, "overwrite_output_dir": False,
        "resume": None, "resume_with_changes": False, "log_interval": 10, "log_with": None,
    }  # fmt: skip


def test_grouped_data_gets_a_group_size_and_no_label_range():
    config = TrainingConfig(**GROUPED)
    assert (config.train_group_size, config.max_label, config.min_label) == (8, None, None)
    assert config.temperature == 1.0


def test_a_decoder_gets_its_four_texts_and_a_given_one_stays():
    config = TrainingConfig(**DECODER, seq="")
    assert (config.query_format, config.document_format) == ("query: {}", "document: {}")
    assert (config.seq, config.special_token) == ("", "\nrelevance")


def test_a_yes_no_head_takes_its_texts_from_the_model_unless_they_are_given():
    config = TrainingConfig(**DECODER, head="yes_no", seq="\n")
    assert (config.head, config.query_format, config.seq, config.yes_token) == ("yes_no", None, "\n", None)
    assert TrainingConfig(**DECODER).head == "scalar"


def test_the_keys_of_the_yes_no_head_are_refused_elsewhere():
    of_the_head = {"instruction": "i", "yes_token": "y", "no_token": "n"}
    assert problems(DECODER, **of_the_head) == dict.fromkeys(
        of_the_head, "is only for head yes_no; add head: yes_no or remove this"
    )
    assert problems(DECODER, head="scalar", yes_token="y").keys() == {"yes_token"}
    assert problems(POINTWISE, head="scalar").keys() == {"head"}
    assert problems(DECODER, head="linear").keys() == {"head"}


def test_the_head_learns_ten_times_faster_unless_told_otherwise():
    assert TrainingConfig(**POINTWISE, lr=2e-5).head_lr == pytest.approx(2e-4)
    assert TrainingConfig(**POINTWISE, lr=2e-5, head_lr=1e-3).head_lr == 1e-3


def test_validation_follows_the_training_data_by_default():
    config = TrainingConfig(**GROUPED, val_dataset="owner/data", train_label_key="grade")
    assert (config.val_dataset_type, config.val_label_key) == ("grouped", "grade")
    assert (config.val_split, config.metric_for_best_model) == ("validation", "ndcg@10")


def test_what_describes_a_validation_that_is_off_is_dropped():
    unused = {"val_dataset_type": "grouped", "val_label_key": "grade", "val_split": "dev"}
    config = TrainingConfig(**POINTWISE, **unused)
    assert (config.val_dataset_type, config.val_label_key, config.val_split) == (None, None, None)


def test_only_hub_datasets_have_a_split():
    assert TrainingConfig(**POINTWISE | {"train_dataset": "owner/data"}).train_split == "train"
    assert TrainingConfig(**POINTWISE | {"train_dataset": "data"}, train_split="dev").train_split == "dev"
    assert TrainingConfig(**POINTWISE, val_dataset="v.jsonl").val_split is None
    found = problems(POINTWISE, train_split="train", val_dataset="/data/v", val_split="test")
    assert found == {
        "train_split": "is only for datasets of the hub, and train_dataset is a file; remove it",
        "val_split": "is only for datasets of the hub, and val_dataset is a file; remove it",
    }


@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "b/a.jsonl.gz", "a.parquet", "./a", "/a", "~/a"])
def test_files_are_told_from_hub_names_by_how_they_are_written(name):
    assert is_data_file_name(name)
    assert not is_data_file_name("owner/name") and not is_data_file_name("name")


def test_lora_defaults_follow_the_rank():
    config = TrainingConfig(**POINTWISE, lora_r=8)
    assert (config.lora_alpha, config.lora_dropout, config.lora_target_modules) == (16, 0.0, None)


def test_lora_settings_without_a_rank_are_refused():
    found = problems(POINTWISE, lora_alpha=8, lora_dropout=0.1, lora_target_modules="all-linear")
    assert found == dict.fromkeys(
        ("lora_alpha", "lora_dropout", "lora_target_modules"),
        "needs lora_r, which switches LoRA on; add lora_r or remove this",
    )


def test_every_loss_accepts_its_own_dataset_type_and_names_the_others_for_the_wrong_one():
    for loss, dataset_type in LOSS_DATASET_TYPE.items():
        base = POINTWISE if dataset_type == "pointwise" else GROUPED
        assert TrainingConfig(**base | {"loss_type": loss}).loss_type == loss
    assert problems(GROUPED, loss_type="point_mse")["loss_type"] == (
        "point_mse is for pointwise data, and train_dataset_type is grouped; "
        "for grouped data use pairwise_ranknet, listwise_ce, listnet, listmle, position_listmle, lambda_loss, "
        "info_nce, adr_mse, margin_mse or kl_distillation"
    )
    assert problems(POINTWISE, loss_type="listwise_ce")["loss_type"] == (
        "listwise_ce is for grouped data, and train_dataset_type is pointwise; "
        "for pointwise data use point_ce or point_mse"
    )


def test_other_names_of_losses_and_keys_become_the_one_name():
    assert LOSS_ALIASES == {"pointwise_bce": "point_ce", "pointwise_mse": "point_mse"}
    config = TrainingConfig(**POINTWISE | {"loss_type": "pointwise_mse"}, epoch=3)
    assert (config.loss_type, config.epochs) == ("point_mse", 3)


def test_epoch_and_epochs_together_are_refused():
    assert problems(POINTWISE, epoch=1, epochs=1)["epoch"] == (
        "is another name of epochs, which is given too; keep one"
    )


def test_more_than_one_label_is_refused_with_the_reason():
    assert problems(POINTWISE, num_labels=2) == {
        "num_labels": "expected 1, found 2: a reranker gives one score per pair"
    }


def test_decoder_texts_with_an_encoder_are_refused_each_by_name():
    texts = {"query_format": "{}", "document_format": "{}", "seq": " ", "special_token": "x"}
    message = "is only for model_type llm_decoder, and model_type is bert_encoder; remove it"
    assert problems(POINTWISE, **texts) == dict.fromkeys(texts, message)


@pytest.mark.parametrize("text", ["", "query:", "{} {}", "{ }"])
def test_a_format_needs_its_place_exactly_once(text):
    found = problems(DECODER, query_format=text, document_format=text)
    expected = f'expected "{{}}" exactly once, where the text goes, found "{text}"'
    assert found == {"query_format": expected, "document_format": expected}


def test_a_group_size_for_pointwise_data_is_refused():
    assert problems(POINTWISE, train_group_size=4) == {
        "train_group_size": "is only for train_dataset_type grouped, and it is pointwise; remove it"
    }


def test_what_is_told_of_a_loss_here_is_what_the_losses_say():
    """The lists here are for a check without torch."""
    assert {name: loss.dataset_type for name, loss in LOSSES.items()} == LOSS_DATASET_TYPE
    assert list(LOSS_DATASET_TYPE) == list(get_args(TrainingConfig.model_fields["loss_type"].annotation))
    readers = {key: tuple(name for name, loss in LOSSES.items() if key in [each.name for each in loss.options])
               for key in LOSS_OPTIONS}
    assert readers == LOSS_OPTIONS
    assert set(LOSS_OPTIONS) == {option.name for loss in LOSSES.values() for option in loss.options}
    assert tuple(name for name, loss in LOSSES.items() if loss.reads == "teacher_score") == TEACHER_LOSSES
    ranges = {name: loss.label_range for name, loss in LOSSES.items() if loss.dataset_type == "grouped"}
    assert {name: found for name, found in ranges.items() if found} == GROUPED_LABEL_RANGES
    (teacher_losses, _) = get_args(TrainingConfig.model_fields["teacher_loss_type"].annotation)
    assert get_args(teacher_losses) == ("point_ce", "point_mse", *TEACHER_LOSSES)


def test_the_page_has_a_row_for_every_loss():
    page = (Path(__file__).resolve().parents[3] / "docs" / "losses.md").read_text(encoding="utf-8")
    for name in LOSSES:
        assert f"\n| `{name}`" in page


@pytest.mark.parametrize(
    ("loss", "derived"),
    [
        ("listwise_ce", {"temperature": 1.0}),
        ("info_nce", {"temperature": 1.0}),
        ("listnet", {}),
        ("lambda_loss", {"lambda_weights": "ndcg_loss2pp", "min_label": 0.0, "max_label": 31.0}),
        ("margin_mse", {"teacher_score_key": "teacher_score"}),
        ("kl_distillation", {"teacher_score_key": "teacher_score", "temperature": 1.0}),
    ],
)
def test_a_loss_gets_the_defaults_of_the_keys_that_it_reads(loss, derived):
    keys = ("temperature", "lambda_weights", "lambda_top_k", "teacher_weight", "teacher_temperature",
            "teacher_score_key", "min_label", "max_label")  # fmt: skip
    config = TrainingConfig(**GROUPED | {"loss_type": loss})
    assert {key: getattr(config, key) for key in keys} == dict.fromkeys(keys) | derived


@pytest.mark.parametrize(
    ("key", "value", "readers"),
    [
        ("temperature", 0.5, "listwise_ce, info_nce or kl_distillation"),
        ("lambda_weights", "lambdarank", "lambda_loss"),
        ("lambda_top_k", 10, "lambda_loss"),
    ],
)
def test_a_key_of_a_loss_is_refused_beside_one_that_does_not_read_it(key, value, readers):
    for name in readers.replace(" or ", ", ").split(", "):
        assert getattr(TrainingConfig(**GROUPED | {"loss_type": name, key: value}), key) == value
    expected = f"is only for loss_type {readers}, and loss_type is listmle; remove it"
    assert problems(GROUPED, loss_type="listmle", **{key: value}) == {key: expected}


def test_a_teacher_loss_gets_half_of_the_weight_unless_told_otherwise():
    config = TrainingConfig(**GROUPED, teacher_loss_type="kl_distillation")
    assert (config.teacher_weight, config.teacher_temperature) == (0.5, 1.0)
    assert config.teacher_score_key == "teacher_score"
    config = TrainingConfig(**POINTWISE, teacher_loss_type="pointwise_bce", teacher_score_key="p", teacher_weight=1)
    assert (config.teacher_loss_type, config.teacher_weight) == ("point_ce", 1.0)
    assert (config.teacher_temperature, config.teacher_score_key) == (None, "p")


@pytest.mark.parametrize(
    ("base", "changes", "found"),
    [
        (GROUPED, {"teacher_weight": 0.5, "teacher_temperature": 2.0}, dict.fromkeys(
            ("teacher_weight", "teacher_temperature"),
            "needs teacher_loss_type, the loss that it is for; add teacher_loss_type or remove this")),
        (GROUPED, {"teacher_score_key": "logit"}, {"teacher_score_key":
            "is only for losses that learn from teacher scores, and loss_type is listwise_ce without "
            "teacher_loss_type; remove it"}),
        (GROUPED, {"teacher_loss_type": "margin_mse", "teacher_temperature": 2.0}, {"teacher_temperature":
            "is only for teacher_loss_type kl_distillation, and teacher_loss_type is margin_mse; remove it"}),
        (GROUPED, {"teacher_loss_type": "point_mse"}, {"teacher_loss_type":
            "point_mse is for pointwise data, and train_dataset_type is grouped; for grouped data use margin_mse or "
            "kl_distillation"}),
        (POINTWISE, {"teacher_loss_type": "kl_distillation"}, {"teacher_loss_type":
            "kl_distillation is for grouped data, and train_dataset_type is pointwise; for pointwise data use "
            "point_ce or point_mse"}),
        (GROUPED, {"loss_type": "lambda_loss", "min_label": -1, "max_label": 40}, {
            "min_label": "lambda_loss takes labels in [0, 31], found -1",
            "max_label": "lambda_loss takes labels in [0, 31], found 40"}),
    ],
)  # fmt: skip
def test_what_a_teacher_or_lambda_loss_does_not_read_or_take_is_refused(base, changes, found):
    assert problems(base, **changes) == found


@pytest.mark.parametrize(
    ("base", "labels", "key", "message"),
    [
        (GROUPED, {"max_label": 3}, "max_label",
         "needs min_label beside it for grouped data; give both or none"),
        (GROUPED, {"min_label": 0}, "min_label",
         "needs max_label beside it for grouped data; give both or none"),
        (GROUPED, {"max_label": 1, "min_label": 1}, "max_label",
         "expected min_label below max_label, found min_label 1 and max_label 1"),
        (POINTWISE, {"min_label": 1.5}, "min_label",
         "expected min_label below max_label, found min_label 1.5 and max_label 1.0"),
        (POINTWISE, {"max_label": -1}, "max_label",
         "expected min_label below max_label, found min_label 0.0 and max_label -1"),
    ],
)  # fmt: skip
def test_label_ranges_that_are_half_given_or_upside_down_are_refused(base, labels, key, message):
    assert problems(base, **labels) == {key: message}


def test_label_ranges_that_fit_are_kept():
    config = TrainingConfig(**POINTWISE, max_label=3)
    assert (config.min_label, config.max_label) == (0.0, 3.0)
    config = TrainingConfig(**GROUPED, max_label=3, min_label=0)
    assert (config.min_label, config.max_label) == (0.0, 3.0)


def test_warmup_and_stable_may_fill_the_schedule_but_no_more():
    TrainingConfig(**POINTWISE, warmup_proportion=0.9, stable_proportion=0.1)
    assert 0.15 + 0.85 + 1e-12 > 1
    TrainingConfig(**POINTWISE, warmup_proportion=0.15, stable_proportion=0.85 + 1e-12)
    assert problems(POINTWISE, warmup_proportion=0.6, stable_proportion=0.5) == {
        "stable_proportion": "expected at most 1 with warmup_proportion, found 0.6 + 0.5"
    }


def test_what_needs_validation_is_refused_without_a_validation_dataset():
    wanted = {"eval_steps": 5, "eval_on_start": True, "metric_for_best_model": "map"}
    wanted["early_stopping_patience"] = 2
    message = "needs val_dataset; add val_dataset or remove this"
    assert problems(POINTWISE, **wanted) == dict.fromkeys(wanted, message)
    config = TrainingConfig(**POINTWISE, val_dataset="v.jsonl", **wanted)
    assert config.metric_for_best_model == "map"


@pytest.mark.parametrize(
    ("key", "wrong"),
    [
        ("batch_size", [True, "32", 2.0, 0, -1, [3]]),
        ("epochs", [True, "2", 1.5, 0]),
        ("gradient_accumulation_steps", [0, 1.5]),
        ("num_labels", [True, "1"]),
        ("max_len", [15, 64.0]),
        ("seed", [-1, True]),
        ("num_workers", [-1, 1.5]),
        ("freeze_layers", [-1, True]),
        ("lora_r", [0, 8.0]),
        ("lora_alpha", [0]),
        ("lora_dropout", [-0.1, 1]),
        ("lora_target_modules", [[], [1], "", 3]),
        ("train_group_size", [1, 8.0]),
        ("save_steps", [0]),
        ("eval_steps", [0]),
        ("log_interval", [0]),
        ("num_max_checkpoints", [0]),
        ("early_stopping_patience", [0]),
        ("lr", [0, -1e-5, True, "5e-5", math.nan, math.inf]),
        ("head_lr", [0]),
        ("weight_decay", [-0.1, math.inf]),
        ("adam_beta1", [1, -0.1]),
        ("adam_beta2", [1, -0.1]),
        ("adam_epsilon", [0]),
        ("max_grad_norm", [0, -1]),
        ("temperature", [0, math.nan]),
        ("max_label", [True, "1", math.nan]),
        ("min_label", [-math.inf]),
        ("shuffle_rate", [-0.1, 1.1]),
        ("warmup_proportion", [-0.1, 1.1]),
        ("stable_proportion", [-0.1, 1.1]),
        ("save_on_epoch_end", ["true", 2, 1.0]),
        ("gradient_checkpointing", ["yes", 2]),
        ("mixed_precision", ["fp32", True]),
        ("model_type", ["bert", 1]),
        ("train_dataset_type", ["pairs"]),
        ("val_dataset_type", ["pairs"]),
        ("loss_type", ["bce", ["point_ce"]]),
        ("metric_for_best_model", ["ndcg"]),
        ("log_with", ["mlflow"]),
        ("output_dir", ["", 2024]),
        ("train_dataset", ["", [], [3], {"path": "a.jsonl"}]),
        ("special_token", [""]),
    ],
)
def test_wrong_types_and_values_outside_the_range_are_refused(key, wrong):
    for value in wrong:
        assert key in problems(POINTWISE, **{key: value}), value


def test_whole_numbers_are_fine_where_numbers_are_expected():
    config = TrainingConfig(**POINTWISE, lr=1, max_label=2)
    assert isinstance(config.lr, float) and config.max_label == 2.0


def test_zero_and_one_are_accepted_as_switches_because_existing_files_write_them():
    assert TrainingConfig(**POINTWISE, save_on_epoch_end=0).save_on_epoch_end is False
    assert TrainingConfig(**POINTWISE, save_on_epoch_end=1).save_on_epoch_end is True


def test_the_false_that_yaml_makes_of_a_bare_no_is_the_precision_no():
    assert TrainingConfig(**POINTWISE, mixed_precision=False).mixed_precision == "no"


@pytest.mark.parametrize("absent", [None, "None", "none"])
def test_none_means_absent_for_every_key(absent):
    optional = TrainingConfig.model_fields.keys() - POINTWISE.keys()
    values = dict.fromkeys(optional - {"max_grad_norm"}, absent)
    assert TrainingConfig(**POINTWISE, **values) == TrainingConfig(**POINTWISE)
    assert set(problems(dict.fromkeys(POINTWISE, absent))) == set(POINTWISE)


def test_none_for_the_gradient_norm_means_no_clipping():
    assert TrainingConfig(**POINTWISE, max_grad_norm=None).max_grad_norm is None
    assert TrainingConfig(**POINTWISE, max_grad_norm="None").max_grad_norm is None


def test_an_unknown_key_is_refused_even_when_it_is_empty():
    assert set(problems(POINTWISE, learning_rate=None, btach_size=3)) == {"learning_rate", "btach_size"}


def test_field_and_cross_field_problems_come_together_where_the_fields_involved_are_valid():
    found = problems(
        POINTWISE, loss_type="listwise_ce", lr=-1, stable_proportion=0.95, warmup_proportion="x", num_labels=3
    )
    assert set(found) == {"loss_type", "lr", "warmup_proportion", "num_labels"}
    found = problems(POINTWISE, model_type="bert", seq=" ", lora_r=0, lora_alpha=1)
    assert set(found) == {"model_type", "lora_r"}
    assert set(problems(POINTWISE, val_dataset=3, eval_steps=5)) == {"val_dataset"}


def test_a_configuration_cannot_be_changed_afterwards():
    config = TrainingConfig(**POINTWISE)
    with pytest.raises(ValidationError):
        config.lr = 1.0


def test_every_key_says_what_it_means():
    assert all(len(field.description) > 15 for field in TrainingConfig.model_fields.values())


def test_the_written_yaml_shows_resolved_values_that_any_yaml_reader_understands():
    written = yaml.safe_load(TrainingConfig(**DECODER, lora_r=4, lora_target_modules=["q", "v"]).to_yaml())
    assert written["lr"] == 5e-5 and written["head_lr"] == 5e-4 and written["lora_alpha"] == 8
    assert written["seq"] == "\n" and written["mixed_precision"] == "no"
    assert list(written) == list(TrainingConfig.model_fields)
