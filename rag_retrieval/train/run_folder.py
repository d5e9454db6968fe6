"""The output folder of a run: whose it is, and how a run starts, goes on and ends in it.

What a reader would get wrong: looking comes first and changing last. `plan_start` only reads; `claim` removes
an earlier run and marks the folder, and is called when data and model are known to be good.
"""

import hashlib
import logging
import os
import shutil
import tempfile
import uuid
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout

from rag_retrieval.train.checkpoints import (
    STATE_FILE,
    CheckpointStore,
    DamagedCheckpoint,
    TrainState,
    flush,
    read_json,
    read_state,
    write_json,
)

logger = logging.getLogger(__name__)

RUN_FILE = "run.json"
RESULTS = ("model", "adapter")
TRACKER_FOLDER = "tracking"


class OutputFolderError(ValueError):
    """The output folder holds something that this run must not touch."""


def folder_lock(output_dir: Path) -> FileLock:
    """The lock of a run on its output folder; the system lets it go when the process ends, however it ends."""
    name = hashlib.sha256(str(output_dir.resolve()).encode()).hexdigest()[:32]
    return FileLock(Path(tempfile.gettempdir()) / f"rag_retrieval-{name}.lock", timeout=0)


def take_lock(lock: FileLock, output_dir: Path) -> None:
    """Raises OutputFolderError where another process trains in the folder, or where nothing can be written to it."""
    existing = next(folder for folder in (output_dir, *output_dir.resolve().parents) if folder.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        raise OutputFolderError(
            f"output_dir: {existing} is {'not writable' if existing.is_dir() else 'a file'}; take another output_dir "
            "or mend its rights or mount"
        )
    try:
        lock.acquire()
    except Timeout:
        raise OutputFolderError(
            f"output_dir: another process is training in {output_dir}; wait for it or take another output_dir"
        ) from None


def plan_start(
    output_dir: Path, resume: str | None, overwrite: bool
) -> tuple[TrainState, Path | None] | None:
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
        found = store.newest()
        if found is None:
            _check_nothing_lost(store)
            return _new_state(), None  # without a checkpoint there is nothing to lose
        return _without_lost_best(output_dir, found[0]), found[1]
    if resume == "auto":
        _check_no_orphans(output_dir)
    state = None
    if resume not in (None, "auto"):
        state = _named_state(Path(resume))
        in_place = Path(resume).resolve().parent == output_dir.resolve()
        if state.run_id == earlier.get("run_id") or (in_place and not earlier):  # a spoilt run file is mended
            return _without_lost_best(output_dir, state), Path(resume)
    _check_free(output_dir, earlier, overwrite)
    if state is None:
        return _new_state(), None
    # another run's checkpoint: its best one is not in this folder
    return replace(_without_best(state), run_id=uuid.uuid4().hex), Path(resume)


def read_run(output_dir: Path) -> dict:
    """run_id and finished of the run in the folder; {} where there is none."""
    values = read_json(output_dir / RUN_FILE)
    return values if isinstance(values.get("run_id"), str) else {}


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
            f"resume: no complete checkpoint is left in {store.folder}, {damaged} are damaged. Start anew with "
            "--overwrite_output_dir true and without --resume, which removes them, or in another output_dir"
        )


def _check_no_orphans(output_dir: Path) -> None:
    """Raises OutputFolderError where there are checkpoints but it cannot be told of which run: starting anew
    beside them would silently lose them."""
    for folder in output_dir.glob("checkpoint-*"):
        run_id = read_json(folder / STATE_FILE).get("run_id")
        if run_id and CheckpointStore(output_dir, run_id, keep=1).newest():
            raise OutputFolderError(
                f"resume: {output_dir / RUN_FILE} is missing or damaged, though there are checkpoints such as "
                f"{folder}; name the one to go on from (--resume {folder}), or take another output_dir"
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
            "the best checkpoint so far, step %d, is gone (%s): the best is looked for anew", state.best_step, damage
        )
        return _without_best(state)


def _new_state() -> TrainState:
    return TrainState(uuid.uuid4().hex)


def _check_free(output_dir: Path, earlier: dict, overwrite: bool) -> None:
    if earlier and not overwrite:
        raise OutputFolderError(
            f"{output_dir} already holds a run. Go on with it: --resume auto. Keep it: another --output_dir. "
            "Replace it: --overwrite_output_dir true"
        )
    for name in RESULTS:
        if not earlier and (output_dir / name).exists():
            raise OutputFolderError(
                f"{output_dir / name} exists, is not of a run of this trainer, and would be replaced at the "
                "end; move it away or take another output_dir"
            )


def claim(output_dir: Path, state: TrainState) -> None:
    """Make the folder this run's, without another run and without what this one wrote beyond the state.

    Removes checkpoints, results, metrics and tracker files that a run wrote, and nothing else.
    """
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
        shutil.rmtree(folder)
    for name in (*RESULTS, TRACKER_FOLDER):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    (output_dir / "metrics.jsonl").unlink(missing_ok=True)


def finish(output_dir: Path, state: TrainState) -> None:
    step = state.step if state.best_step is None else state.best_step
    write_json(output_dir / RUN_FILE, {"run_id": state.run_id, "finished": True, "model_step": step})


def replace_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder aside, then put it in the place of `final`."""
    aside, old = (final.with_name(f".{final.name}.{end}") for end in ("incomplete", "old"))
    for folder in (aside, old):
        shutil.rmtree(folder, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    flush(aside)
    if final.exists():
        os.replace(final, old)
    os.replace(aside, final)
    shutil.rmtree(old, ignore_errors=True)
