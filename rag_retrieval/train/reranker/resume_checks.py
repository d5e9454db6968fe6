"""May a run go on from a checkpoint? Only as the same run: what would change the training is compared and said.

What a reader would get wrong: the list below is of keys that may change; every other key, a new one too, matters.
Validation matters as well, since the best score so far and the patience of early stopping were measured with it.
"""

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from pydantic import ValidationError

from rag_retrieval.core.files import content_digest
from rag_retrieval.data.store import RecordStore
from rag_retrieval.train.checkpoints import TrainState
from rag_retrieval.train.provenance import Provenance, engine_of, library_versions
from rag_retrieval.train.reranker.config import RerankerConfig, resolved_entries

logger = logging.getLogger(__name__)

MAY_CHANGE = {
    *("output_dir", "overwrite_output_dir", "resume", "resume_with_changes", "trust_remote_code"),
    *("log_interval", "log_with", "num_workers", "save_on_epoch_end", "save_steps", "num_max_checkpoints"),
    *("eval_steps", "eval_on_start", "early_stopping_patience"),
    # the same step in other arithmetic
    *("max_tokens_per_batch", "gradient_checkpointing", "attn_implementation", "torch_compile"),
}
STEP_SIZE = ("batch_size", "gradient_accumulation_steps")  # times processes
VALIDATION = {"val_dataset", "val_dataset_type", "val_label_key", "val_split", "metric_for_best_model"}


class ResumeError(ValueError):
    """The checkpoint and this run do not fit; the message has a line for each difference."""


def provenance(
    config: RerankerConfig, accelerator: Accelerator, train: Sequence[RecordStore], validation: RecordStore | None
) -> Provenance:
    """What the checkpoints of this run will say of it."""
    stores = dict(zip(file_keys(len(train)), train, strict=True)) | {"val_dataset": validation}
    data = {name: store_digest(store) for name, store in stores.items() if store is not None}
    processes = accelerator.num_processes
    return Provenance(config.model_dump(), data, engine_of(accelerator), processes, library_versions())


def file_keys(files: int) -> list[str]:
    """What the training files are called in a checkpoint and in messages."""
    return ["train_dataset"] if files == 1 else [f"train_dataset entry {number}" for number in range(1, files + 1)]


def store_digest(store: RecordStore) -> str:
    return content_digest(store.files)


def checked_resume(state: TrainState, checkpoint: Path, now: Provenance, with_changes: bool) -> TrainState:
    """The state to go on with. Raises ResumeError where the engine does not allow it, or where something that
    matters differs and `with_changes` is False; warns of other library versions."""
    before = completed(Provenance.read(checkpoint))
    check_engine(checkpoint, before, now)
    found = dict(differences(before, now))
    if found and not with_changes:
        lines = "".join(f"\n  {key}: {change}" for key, change in found.items())
        raise ResumeError(
            f"resume: {checkpoint} is of a run that was configured otherwise:{lines}\nRestore these to go on with "
            "that run, or say --resume_with_changes true to go on with the new ones"
        )
    for key, change in found.items():
        logger.warning("resume_with_changes: %s: %s", key, change)
    for library, version in before.versions.items():
        if now.versions[library] != version:
            logger.warning("resume: written with %s %s, now %s: the last digits of weights may differ from those of a "
                           "run never stopped", library, version, now.versions[library])
    if found.keys() & VALIDATION:  # what was measured otherwise is not compared with
        return replace(state, best_metric=None, best_step=None, stale_evaluations=0)
    return state


def completed(before: Provenance) -> Provenance:
    """With the keys of today: what another version of this package did not know had the default that it has now."""
    try:
        return replace(before, configuration=RerankerConfig(**before.configuration).model_dump())
    except ValidationError as error:
        raise ResumeError(f"resume: the checkpoint is of another version of rag_retrieval: {error}") from error


def check_engine(checkpoint: Path, before: Provenance, now: Provenance) -> None:
    """The files of one engine are not those of another, and DeepSpeed's are one for each process."""
    where = f"resume: {checkpoint} was written by {before.engine} on {before.processes} processes"
    remedy = f"; or start a new run from its weights: --model_name_or_path {checkpoint / 'model'}"
    if before.engine != now.engine:
        raise ResumeError(f"{where}, and {now.engine} cannot read it. Launch with {before.engine}{remedy}")
    if before.engine.startswith("DeepSpeed") and before.processes != now.processes:
        raise ResumeError(
            f"{where}, and DeepSpeed resumes on that number alone, not on {now.processes}. Launch "
            f"{before.processes} processes{remedy}"
        )


def differences(before: Provenance, now: Provenance) -> Iterator[tuple[str, str]]:
    """(key, "was X, now Y") of everything that matters, in the order of the configuration."""
    was, becomes = before.configuration, now.configuration
    for key in becomes | was:
        if key == "train_dataset":
            yield from file_differences(before, now)
        elif key == "val_dataset":
            yield from content_difference(before, now, key, was.get(key), becomes.get(key))
        elif key not in MAY_CHANGE and key not in STEP_SIZE and was.get(key) != becomes.get(key):
            yield key, f"was {was.get(key)!r}, now {becomes.get(key)!r}"


def file_differences(before: Provenance, now: Provenance) -> Iterator[tuple[str, str]]:
    """Of the training files: how many, what is in each, the size of its steps, and what a list says of it."""
    was, becomes = before.configuration, now.configuration
    old, new = resolved_entries(was), resolved_entries(becomes)
    if len(old) != len(new):
        yield "train_dataset", f"was {len(old)} files, now {len(new)}"
        return
    listed = isinstance(was["train_dataset"], list) or isinstance(becomes["train_dataset"], list)
    for key, old_entry, new_entry in zip(file_keys(len(old)), old, new, strict=True):
        yield from content_difference(before, now, key, old_entry["path"], new_entry["path"])
        place = f"{key}, " if listed else ""
        for name in new_entry if listed else ():  # else these are keys of the run
            if name not in ("path", *STEP_SIZE) and old_entry[name] != new_entry[name]:
                yield f"{place}{name}", f"was {old_entry[name]!r}, now {new_entry[name]!r}"
        factors, new_factors = step_factors(before, old_entry), step_factors(now, new_entry)
        if math.prod(factors) != math.prod(new_factors):
            product = f"{place}batch_size x gradient_accumulation_steps x processes"
            yield product, f"was {_product(factors)}, now {_product(new_factors)}"


def content_difference(
    before: Provenance, now: Provenance, key: str, path: str | None, new_path: str | None
) -> Iterator[tuple[str, str]]:
    if before.data.get(key) != now.data.get(key):
        yield key, f"was {_told(path, before, key)}, now {_told(new_path, now, key)}"


def _told(path: str | None, of: Provenance, key: str) -> str:
    return f"{path} (content {of.data[key]})" if key in of.data else "none"


def step_factors(of: Provenance, entry: Mapping[str, Any]) -> list[int]:
    """What the records of a step of an entry's file are the product of."""
    values = {**of.configuration, **entry}
    return [*(values[key] for key in STEP_SIZE), of.processes]


def _product(factors: list[int]) -> str:
    return f"{' x '.join(map(str, factors))} = {math.prod(factors)}"
