"""The values of keys that were not given, where they hang on other keys (`head_lr` is 10 x `lr`).

Easy to get wrong: `values` must be valid and fit each other; `config_checks` comes first.
"""

from collections.abc import Mapping
from typing import Any

from rag_retrieval.core.config_schema import is_data_file_name
from rag_retrieval.train.reranker.config_checks import (
    DECODER_DEFAULTS,
    GROUPED_LABEL_RANGES,
    LOSS_OPTIONS,
    TEACHER_LOSSES,
)


def derived_values(values: Mapping[str, Any]) -> dict[str, Any]:
    """Values for keys not given, from the values of other keys. `values` are valid and fit each other."""
    derived = {"head_lr": 10 * values["lr"]}
    if values["model_type"] == "llm_decoder":
        derived["head"] = "scalar"
        if values["head"] != "yes_no":  # whose texts come with the model
            derived |= DECODER_DEFAULTS
    if values["train_dataset_type"] == "grouped":
        derived["train_group_size"] = 8
    else:
        derived |= {"max_label": 1.0, "min_label": 0.0}
    derived |= _loss_values(values)
    if isinstance(values["train_dataset"], str) and not is_data_file_name(values["train_dataset"]):
        derived["train_split"] = "train"
    if values["lora_r"] is not None:
        derived |= {"lora_alpha": 2 * values["lora_r"], "lora_dropout": 0.0}
    derived |= _validation_values(values)
    return {key: value for key, value in derived.items() if value is None or values[key] is None}


def _loss_values(values: Mapping[str, Any]) -> dict[str, Any]:
    loss, teacher_loss = values["loss_type"], values["teacher_loss_type"]
    derived = {}
    if loss in LOSS_OPTIONS["temperature"]:
        derived["temperature"] = 1.0
    if loss in LOSS_OPTIONS["lambda_weights"]:
        derived["lambda_weights"] = "ndcg_loss2pp"
    if loss in GROUPED_LABEL_RANGES:
        derived["min_label"], derived["max_label"] = GROUPED_LABEL_RANGES[loss]
    if teacher_loss is not None:
        derived["teacher_weight"] = 0.5
    if teacher_loss == "kl_distillation":
        derived["teacher_temperature"] = 1.0
    if teacher_loss is not None or loss in TEACHER_LOSSES:
        derived["teacher_score_key"] = "teacher_score"
    return derived


def _validation_values(values: Mapping[str, Any]) -> dict[str, Any]:
    if values["val_dataset"] is None:
        # what describes a validation that is off is dropped: the saved configuration must not suggest one
        return dict.fromkeys(("val_dataset_type", "val_label_key", "val_split"))
    return {
        "val_dataset_type": values["train_dataset_type"],
        "val_label_key": values["train_label_key"],
        "metric_for_best_model": "ndcg@10",
    } | ({} if is_data_file_name(values["val_dataset"]) else {"val_split": "validation"})
