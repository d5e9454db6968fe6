"""What a training run left beside its model: configuration, data, versions, measurements.

A card goes to other people, so of a path on this machine only the last part is shown; `shown` is for every value that
may be one.
"""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml

from rag_retrieval.data.readers import is_file
from rag_retrieval.data.summary import StoreSummary
from rag_retrieval.models.settings import PACKAGE_PREFIX
from rag_retrieval.train.run_folder import CONFIGURATION_FILE, DATA_FILE, METRICS_FILE, PROVENANCE_FILE, RUN_FILE

LOCAL_ONLY_KEYS = {
    *("output_dir", "overwrite_output_dir", "resume", "resume_with_changes"),
    *("num_workers", "wait_minutes", "log_with"),
}


@dataclass(frozen=True)
class DataPart:
    """One file of a run's data. purpose: "training" or "validation". source: its path or its name on the hub."""

    purpose: str
    source: str
    summary: StoreSummary


@dataclass(frozen=True)
class RunRecord:
    """configuration: keys of the YAML. data: in the order of the configuration, validation last.

    provenance: engine, processes, versions. step: the optimizer step of the final model, None where no run says it.
    measured: validation metrics of that step; empty where nothing was measured then.
    """

    configuration: dict[str, Any]
    data: list[DataPart]
    provenance: dict[str, Any]
    step: int | None
    measured: dict[str, float]


def read_run_record(folder: Path) -> RunRecord | None:
    """Of a run's output folder; None where no run wrote one. Whatever else is missing is left out.

    Raises ValueError for a file that is damaged.
    """
    if not (folder / CONFIGURATION_FILE).is_file():
        return None
    configuration = parsed(folder / CONFIGURATION_FILE, yaml.safe_load)
    step = parsed(folder / RUN_FILE).get("model_step")
    lines = parsed(folder / METRICS_FILE, lambda text: list(map(json.loads, text.splitlines())))
    evaluations = [line for line in lines if line["kind"] == "eval" and line["step"] == step]
    last = evaluations[-1] if evaluations else {}
    measured = {name: value for name, value in last.items() if name not in ("step", "kind")}
    data = [part_from(values) for values in parsed(folder / DATA_FILE)]
    return RunRecord(configuration, data, parsed(folder / PROVENANCE_FILE), step, measured)


def parsed(path: Path, parse=json.loads):
    """What the file holds; {} where it is not there."""
    if not path.is_file():
        return {}
    try:
        return parse(path.read_text(encoding="utf-8"))
    except (ValueError, yaml.YAMLError) as error:
        raise ValueError(f"{path}: damaged ({error}); remove it, and the card goes without it") from error


def parts_to_write(parts: list[DataPart]) -> list[dict[str, Any]]:
    return [asdict(part) for part in parts]


def part_from(values: dict[str, Any]) -> DataPart:
    summary = values["summary"]
    histogram = [tuple(bar) for bar in summary["label_histogram"]]
    return DataPart(values["purpose"], values["source"], StoreSummary(**summary | {"label_histogram": histogram}))


def is_local(name: str) -> bool:
    """Whether a model's or data set's name is of this machine, and not of the hub."""
    return name.startswith(PACKAGE_PREFIX) or is_file(name)


def shown(name: str) -> str:
    """A name for other people: of a path its last part, of the model of a run the run's."""
    if not is_local(name) or name.startswith(PACKAGE_PREFIX):
        return name
    path = Path(name)
    return path.parent.name if path.name == "model" and path.parent.name else path.name


def shown_configuration(configuration: dict[str, Any]) -> dict[str, Any]:
    """The configuration without what is absent, what only says where and how it ran, and paths."""
    values = {key: value for key, value in configuration.items() if key not in LOCAL_ONLY_KEYS}
    return without_paths(values)


def without_paths(values: dict[str, Any]) -> dict[str, Any]:
    """Without what is absent, each path as `shown`; the entries of a `train_dataset` that is a list likewise."""
    values = {key: value for key, value in values.items() if value is not None}
    if isinstance(values.get("train_dataset"), list):
        values["train_dataset"] = [without_paths(entry) for entry in values["train_dataset"]]
    paths = ("model_name_or_path", "train_dataset", "val_dataset", "path")
    return values | {key: shown(values[key]) for key in paths if isinstance(values.get(key), str)}
