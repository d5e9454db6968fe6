"""Which values of a training configuration do not fit each other, though each is valid by itself.

Easy to get wrong: the checks run before any value is derived from other keys, and also when some keys are
invalid. `values` then lacks those, and a check that needs one of them must stay silent: it asks with `in`, or
with `.get` and a default that gives no complaint. A None that is there says "not given".
"""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from rag_retrieval.core.config_schema import is_data_file_name
from rag_retrieval.train.reranker.training_files import as_entries

LOSS_DATASET_TYPE = {
    "point_ce": "pointwise",
    "point_mse": "pointwise",
    "pairwise_ranknet": "grouped",
    "listwise_ce": "grouped",
    "listnet": "grouped",
    "listmle": "grouped",
    "position_listmle": "grouped",
    "lambda_loss": "grouped",
    "info_nce": "grouped",
    "adr_mse": "grouped",
    "margin_mse": "grouped",
    "kl_distillation": "grouped",
}
TEACHER_LOSSES = ("margin_mse", "kl_distillation")  # learn from teacher scores also as loss_type
LOSS_OPTIONS = {  # which values of loss_type read a key
    "temperature": ("listwise_ce", "info_nce", "kl_distillation"),
    "lambda_weights": ("lambda_loss",),
    "lambda_top_k": ("lambda_loss",),
}
GROUPED_LABEL_RANGES = {"lambda_loss": (0.0, 31.0)}
DECODER_DEFAULTS = {
    "query_format": "query: {}",
    "document_format": "document: {}",
    "seq": "\n",
    "special_token": "\nrelevance",
}
YES_NO_KEYS = ("instruction", "yes_token", "no_token")


def cross_field_problems(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """(key, message) for valid values that do not fit each other. Invalid keys are missing in `values`."""
    yield from _check_model(values)
    yield from _check_data(values)
    yield from _check_loss(values)
    yield from _check_training(values)
    yield from _check_validation(values)


def _given(values: Mapping[str, Any], keys: Iterable[str]) -> list[str]:
    """Those of `keys` that ask for something (None and False do not)."""
    return [key for key in keys if values.get(key) is not None and values[key] is not False]


def _check_model(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if values.get("num_labels", 1) != 1:
        yield "num_labels", f"expected 1, found {values['num_labels']}: a reranker gives one score per pair"
    if values.get("model_type") == "bert_encoder":
        for key in _given(values, [*DECODER_DEFAULTS, "head", *YES_NO_KEYS]):
            yield key, "is only for model_type llm_decoder, and model_type is bert_encoder; remove it"
    elif "head" in values and values["head"] != "yes_no":
        for key in _given(values, YES_NO_KEYS):
            yield key, "is only for head yes_no; add head: yes_no or remove this"
    for key in _given(values, ("query_format", "document_format")):
        if values[key].count("{}") != 1:
            found = json.dumps(values[key], ensure_ascii=False)
            yield key, f'expected "{{}}" exactly once, where the text goes, found {found}'


def _check_data(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    dataset_type = values.get("train_dataset_type")
    if dataset_type == "pointwise" and _given(values, ["train_group_size"]):
        yield "train_group_size", "is only for train_dataset_type grouped, and it is pointwise; remove it"
    for split, dataset in (("train_split", "train_dataset"), ("val_split", "val_dataset")):
        names = [entry.get("path") for entry in as_entries(values.get(dataset))]
        if _given(values, [split]) and all(isinstance(name, str) and is_data_file_name(name) for name in names):
            yield split, f"is only for datasets of the hub, and {dataset} is a file; remove it"
    yield from _check_label_range(values, dataset_type)


def _check_label_range(values: Mapping[str, Any], dataset_type: str | None) -> Iterator[tuple[str, str]]:
    given = _given(values, ("max_label", "min_label"))
    if not given or dataset_type is None or not {"max_label", "min_label"} <= values.keys():
        return
    if dataset_type == "grouped" and len(given) == 1:
        other = {"max_label": "min_label", "min_label": "max_label"}[given[0]]
        yield given[0], f"needs {other} beside it for grouped data; give both or none"
        return
    bounds = {"max_label": 1.0, "min_label": 0.0} | {key: values[key] for key in given}
    if bounds["min_label"] >= bounds["max_label"]:
        low, high = bounds["min_label"], bounds["max_label"]
        yield given[0], f"expected min_label below max_label, found min_label {low} and max_label {high}"


def _check_loss(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    loss = values.get("loss_type")
    for key in ("loss_type", "teacher_loss_type"):
        yield from _check_dataset_type(key, values.get(key), values.get("train_dataset_type"))
    for key, losses in LOSS_OPTIONS.items():
        if loss and loss not in losses and _given(values, [key]):
            yield key, f"is only for loss_type {_listed(losses)}, and loss_type is {loss}; remove it"
    yield from _check_loss_labels(values)
    yield from _check_teacher(values)


def _check_dataset_type(key: str, loss: str | None, dataset_type: str | None) -> Iterator[tuple[str, str]]:
    if loss and dataset_type and LOSS_DATASET_TYPE[loss] != dataset_type:
        allowed = LOSS_DATASET_TYPE if key == "loss_type" else ("point_ce", "point_mse", *TEACHER_LOSSES)
        fitting = _listed([name for name in allowed if LOSS_DATASET_TYPE[name] == dataset_type])
        yield key, (f"{loss} is for {LOSS_DATASET_TYPE[loss]} data, and train_dataset_type is "
                    f"{dataset_type}; for {dataset_type} data use {fitting}")


def _check_loss_labels(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    low, high = GROUPED_LABEL_RANGES.get(values.get("loss_type"), (float("-inf"), float("inf")))
    for key in _given(values, ("max_label", "min_label")):
        if values.get("train_dataset_type") == "grouped" and not low <= values[key] <= high:
            yield key, f"{values['loss_type']} takes labels in [{low:g}, {high:g}], found {values[key]}"


def _check_teacher(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    if "teacher_loss_type" not in values:
        return
    teacher_loss = values["teacher_loss_type"]
    if teacher_loss is None:
        for key in _given(values, ("teacher_weight", "teacher_temperature")):
            yield key, "needs teacher_loss_type, the loss that it is for; add teacher_loss_type or remove this"
        if values.get("loss_type", "invalid") not in (*TEACHER_LOSSES, "invalid") and _given(
            values, ["teacher_score_key"]
        ):
            yield "teacher_score_key", (f"is only for losses that learn from teacher scores, and loss_type is "
                                        f"{values['loss_type']} without teacher_loss_type; remove it")
    elif teacher_loss != "kl_distillation" and _given(values, ["teacher_temperature"]):
        yield "teacher_temperature", (f"is only for teacher_loss_type kl_distillation, and teacher_loss_type is "
                                      f"{teacher_loss}; remove it")


def _listed(names: Iterable[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


def _check_training(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    warmup, stable = values.get("warmup_proportion", 0.0), values.get("stable_proportion", 0.0)
    if warmup + stable > 1 + 1e-9:  # 0.7 + 0.2 + 0.1 is not 1 in binary
        yield "stable_proportion", f"expected at most 1 with warmup_proportion, found {warmup} + {stable}"
    if "lora_r" in values and values["lora_r"] is None:
        for key in _given(values, ("lora_alpha", "lora_dropout", "lora_target_modules")):
            yield key, "needs lora_r, which switches LoRA on; add lora_r or remove this"


def _check_validation(values: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    # val_dataset_type and the like are let through: they ask for nothing, and `--val_dataset None` stays easy
    if values.get("val_dataset", "invalid") is None:
        keys = ("eval_steps", "eval_on_start", "metric_for_best_model", "early_stopping_patience")
        for key in _given(values, keys):
            yield key, "needs val_dataset; add val_dataset or remove this"
