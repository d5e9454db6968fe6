"""The entries of a `train_dataset` that is a list: what each may say, and what it takes from the run.

An entry stands for the run as it would be on that file alone; its keys are those of the run, without `train_`.
What a reader would get wrong: an entry of another type or loss than the run's takes none of the run's keys that go
with these, since a label range of pairs says nothing of groups, nor a temperature of one loss anything of another.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rag_retrieval.core.config_schema import ABSENT, is_data_file_name, shown_value

RUN_KEYS = {  # key of an entry: the run's key for which it stands
    "path": "train_dataset",
    "type": "train_dataset_type",
    "label_key": "train_label_key",
    "split": "train_split",
    "group_size": "train_group_size",
    "max_label": "max_label",
    "min_label": "min_label",
    "loss_type": "loss_type",
    "temperature": "temperature",
    "lambda_weights": "lambda_weights",
    "lambda_top_k": "lambda_top_k",
    "teacher_loss_type": "teacher_loss_type",
    "teacher_weight": "teacher_weight",
    "teacher_temperature": "teacher_temperature",
    "teacher_score_key": "teacher_score_key",
    "batch_size": "batch_size",
}
GO_WITH = {
    "train_dataset_type": ("train_group_size", "max_label", "min_label"),
    "loss_type": (
        *("temperature", "lambda_weights", "lambda_top_k"),
        *("teacher_loss_type", "teacher_weight", "teacher_temperature", "teacher_score_key"),
    ),
}


def as_entries(train_dataset: Any) -> list[Mapping[str, Any]]:
    """The entries of a valid `train_dataset`; one file alone is a list of one."""
    listed = train_dataset if isinstance(train_dataset, list) else [train_dataset]
    return [entry if isinstance(entry, Mapping) else {"path": entry} for entry in listed]


def entry_problems(entry: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with an entry by itself, but for the values of the run's keys."""
    for key in entry:
        if key not in ("weight", *RUN_KEYS):
            yield f"unknown key {key}; an entry takes weight, {', '.join(RUN_KEYS)}"
    if not isinstance(entry.get("path"), str) or entry["path"] in ("", *ABSENT):
        yield f"path: expected a file or a hub dataset, found {shown_value(entry.get('path'))}"
    weight = weight_of(entry)
    if type(weight) not in (int, float) or not 0 < weight < math.inf:
        yield f"weight: expected a number above 0, the passes over the file in one epoch, found {shown_value(weight)}"


def weight_of(entry: Mapping[str, Any]) -> float:
    return 1.0 if entry.get("weight") in ABSENT else entry["weight"]


def own_values(entry: Mapping[str, Any]) -> dict[str, Any]:
    """What an entry says, by the run's keys. None says that the run's value is not to be taken."""
    given = {RUN_KEYS[key]: value for key, value in entry.items() if key in RUN_KEYS}
    return {key: None if value in ABSENT else value for key, value in given.items()}


def values_alone(run: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run on the entry's file alone: its own, and those of the run that it takes."""
    values = {**run, **own}
    for decisive, followers in GO_WITH.items():
        if values.get(decisive) != run.get(decisive):
            values |= {key: own.get(key) for key in followers}
    if "train_split" not in own and is_data_file_name(values["train_dataset"]):
        values["train_split"] = None
    return values


def resolved_entry(weight: float, values: Mapping[str, Any]) -> dict[str, Any]:
    """An entry that says everything, of the finished values of a run on its file alone."""
    return {"weight": float(weight)} | {key: values[run_key] for key, run_key in RUN_KEYS.items()}


def resolved_entries(run: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries of a finished run; one file alone is an entry of weight 1 that says what the run says."""
    files = run["train_dataset"]
    return files if isinstance(files, list) else [resolved_entry(1.0, run)]


def in_words_of_an_entry(message: str) -> str:
    """A message of the run's keys, with those of an entry."""
    for key, run_key in sorted(RUN_KEYS.items(), key=lambda names: -len(names[1])):  # one is part of another
        message = message.replace(run_key, key)
    return message


def entry_name(number: int, entry: Mapping[str, Any]) -> str:
    """For messages: `entry 2 (b.jsonl)`. number: from 1."""
    return f"entry {number} ({Path(str(entry.get('path'))).name})"
