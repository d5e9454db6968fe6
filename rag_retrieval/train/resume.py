"""Where a run starts or resumes in its output folder, and whether a checkpoint fits it.

`plan_start` only reads. `claim` removes an earlier run and marks the folder, and is called when data and model are
known to be good. Nothing is removed but what a run of this trainer wrote, by its exact name and never through a link.

Every key that is not in MAY_CHANGE, a new one too, must be as it was. Those of validation as well, since the best value
so far and the patience of early stopping were measured with it.
"""

import logging
import math
import shutil
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from rag_retrieval.core.files import is_real_folder, write_json
from rag_retrieval.train.checkpoints import CheckpointStore, DamagedCheckpoint, TrainState, read_state
from rag_retrieval.train.config import TrainingConfig
from rag_retrieval.train.run_folder import RUN_FILE, WRITTEN, OutputFolderError, Provenance, check_free, read_run

logger = logging.getLogger(__name__)

MAY_CHANGE = {
    *("output_dir", "overwrite_output_dir", "resume", "resume_with_changes", "trust_remote_code"),
    *("log_interval", "log_with", "num_workers", "wait_minutes"),
    *("save_on_epoch_end", "save_steps", "num_max_checkpoints"),
    *("eval_steps", "eval_on_start", "early_stopping_patience"),
    # the same step in other arithmetic
    *("max_tokens_per_batch", "max_tokens_with_graph", "gradient_checkpointing"),
    *("attn_implementation", "torch_compile"),
}
STEP_SIZE = ("batch_size", "gradient_accumulation_steps")  # times processes


class ResumeError(ValueError):
    """The checkpoint and this run do not fit; the message has a line for each difference."""


def plan_start(output_dir: Path, resume: str | None, overwrite: bool) -> tuple[TrainState, Path | None] | None:
    """The state to start from and the checkpoint that it was saved in (None: from the beginning).

    resume: None, "auto" (the newest complete checkpoint in output_dir, if any) or a checkpoint folder, which
    may be of another run. None alone is returned where auto finds the run finished. Raises OutputFolderError
    when output_dir holds another run or results that are not a run's, ValueError when `resume` is no complete
    checkpoint.
    """
    earlier = read_run(output_dir)
    if resume == "auto" and earlier:
        if earlier.get("finished"):
            return None
        store = CheckpointStore(output_dir, earlier["run_id"], keep=1)
        newest = store.newest()
        if newest is None:
            _check_nothing_lost(store)
            return _new_state(), None  # without a checkpoint there is nothing to lose
        return _without_lost_best(output_dir, newest[0]), newest[1]
    if resume == "auto":
        _check_no_orphans(output_dir)
    state = None
    if resume not in (None, "auto"):
        state = _named_state(Path(resume))
        in_place = Path(resume).resolve().parent == output_dir.resolve()
        if state.run_id == earlier.get("run_id") or (in_place and not earlier):  # a damaged run file is written again
            return _without_lost_best(output_dir, state), Path(resume)
    check_free(output_dir, earlier, overwrite)
    if state is None:
        return _new_state(), None
    # another run's checkpoint: its best one is not in this folder
    return replace(_without_best(state), run_id=uuid.uuid4().hex), Path(resume)


def _named_state(folder: Path) -> TrainState:
    try:
        return read_state(folder)
    except DamagedCheckpoint as damage:
        raise ValueError(
            f"resume: {folder} is no complete checkpoint ({damage}); give another folder checkpoint-N of a run, or "
            "auto, which takes the newest complete one"
        ) from None


def _check_nothing_lost(store: CheckpointStore) -> None:
    """Raises OutputFolderError where there are checkpoints but all are damaged: a new run would remove them."""
    damaged = ", ".join(folder.name for _, folder in store.own())
    if damaged:
        raise OutputFolderError(
            f"resume: no complete checkpoint is left in {store.folder}, {damaged} are damaged. Start over with "
            "--overwrite_output_dir true and without --resume, which removes them, or in another output_dir"
        )


def _check_no_orphans(output_dir: Path) -> None:
    """Raises OutputFolderError where there are complete checkpoints but no record of their run: starting over
    beside them would silently lose them."""
    for folder in output_dir.glob("checkpoint-*"):
        try:
            read_state(folder)
        except DamagedCheckpoint:
            continue
        raise OutputFolderError(
            f"resume: {output_dir / RUN_FILE} is missing or damaged, though there are checkpoints such as {folder}; "
            f"name the one to resume from (--resume {folder}), or take another output_dir"
        )


def _without_best(state: TrainState) -> TrainState:
    return replace(state, best_metric=None, best_step=None, stale_evaluations=0)


def _without_lost_best(output_dir: Path, state: TrainState) -> TrainState:
    """The state, without a best checkpoint where that is gone: a run that went further removes it."""
    if state.best_step in (None, state.step):
        return state
    try:
        read_state(CheckpointStore(output_dir, state.run_id, keep=1).path(state.best_step))
        return state
    except DamagedCheckpoint as damage:
        logger.warning(
            "the best checkpoint so far, step %d, is gone (%s): the best is chosen again", state.best_step, damage
        )
        return _without_best(state)


def _new_state() -> TrainState:
    return TrainState(uuid.uuid4().hex)


def claim(output_dir: Path, state: TrainState) -> None:
    """Make the folder this run's, without another run and without what this one wrote beyond the state."""
    output_dir.mkdir(parents=True, exist_ok=True)
    earlier = read_run(output_dir)
    if earlier and earlier["run_id"] != state.run_id:
        _remove_run(output_dir, earlier["run_id"])
    CheckpointStore(output_dir, state.run_id, keep=1).remove_after(state.step)
    write_json(output_dir / RUN_FILE, {"run_id": state.run_id, "finished": False})


def _remove_run(output_dir: Path, run_id: str) -> None:
    checkpoints = CheckpointStore(output_dir, run_id, keep=1)
    checkpoints.remove_incomplete()
    for _, folder in checkpoints.own():
        checkpoints.remove(folder)
    for path in (output_dir / name for name in WRITTEN):
        if is_real_folder(path):
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)  # of a link, the link alone


# --- is it the same run? ---


def file_keys(files: int) -> list[str]:
    """What the training files are called in a checkpoint and in messages."""
    return ["train_dataset"] if files == 1 else [f"train_dataset entry {number}" for number in range(1, files + 1)]


def checked_resume(
    state: TrainState, checkpoint: Path, now: Provenance, config_class: type[TrainingConfig], with_changes: bool
) -> TrainState:
    """The state to resume with. Raises ResumeError where the engine does not allow it, or where something that
    matters differs and `with_changes` is False; warns of other library versions."""
    before = completed(Provenance.read(checkpoint), config_class)
    check_engine(checkpoint, before, now)
    changes = dict(differences(before, now, config_class))
    if changes and not with_changes:
        lines = "".join(f"\n  {key}: {change}" for key, change in changes.items())
        raise ResumeError(
            f"resume: {checkpoint} is of a run that was configured otherwise:{lines}\nRestore these to continue "
            "that run, or say --resume_with_changes true to continue with the new ones"
        )
    for key, change in changes.items():
        logger.warning("resume_with_changes: %s: %s", key, change)
    for library, version in before.versions.items():
        if now.versions[library] != version:
            logger.warning("resume: written with %s %s, now %s: the last digits of weights may differ from those of a "
                           "run never stopped", library, version, now.versions[library])
    if changes.keys() & config_class.validation_keys:  # what was measured otherwise is not compared with
        return replace(state, best_metric=None, best_step=None, stale_evaluations=0)
    return state


def completed(before: Provenance, config_class: type[TrainingConfig]) -> Provenance:
    """With the keys of today: what another version of this package did not know had the default that it has now."""
    try:
        return replace(before, configuration=config_class(**before.configuration).model_dump())
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


def differences(before: Provenance, now: Provenance, config_class: type[TrainingConfig]) -> Iterator[tuple[str, str]]:
    """(key, "was X, now Y") of everything that matters, in the order of the configuration."""
    was, becomes = before.configuration, now.configuration
    for key in becomes | was:
        if key == "train_dataset":
            yield from file_differences(before, now, config_class)
        elif key == "val_dataset":
            yield from content_difference(before, now, key, was.get(key), becomes.get(key))
        elif key not in MAY_CHANGE and key not in STEP_SIZE and was.get(key) != becomes.get(key):
            yield key, f"was {was.get(key)!r}, now {becomes.get(key)!r}"


def file_differences(
    before: Provenance, now: Provenance, config_class: type[TrainingConfig]
) -> Iterator[tuple[str, str]]:
    """Of the training files: their number, and each one's content, step size and keys of its entry."""
    was, becomes = before.configuration, now.configuration
    old, new = config_class.resolved_entries(was), config_class.resolved_entries(becomes)
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
        yield key, f"was {_describe_data(path, before, key)}, now {_describe_data(new_path, now, key)}"


def _describe_data(path: str | None, of: Provenance, key: str) -> str:
    return f"{path} (content {of.data[key]})" if key in of.data else "none"


def step_factors(of: Provenance, entry: Mapping[str, Any]) -> list[int]:
    """What the records of a step of an entry's file are the product of."""
    values = {**of.configuration, **entry}
    return [*(values[key] for key in STEP_SIZE), of.processes]


def _product(factors: list[int]) -> str:
    return f"{' x '.join(map(str, factors))} = {math.prod(factors)}"
