"""Where a run starts or goes on in its output folder.

`plan_start` only reads. `claim` removes an earlier run and marks the folder, and is called when data and model are
known to be good. Nothing is removed but what a run of this trainer wrote, by its exact name and never through a link.
"""

import logging
import shutil
import uuid
from dataclasses import replace
from pathlib import Path

from rag_retrieval.core.files import is_real_folder, write_json
from rag_retrieval.train.checkpoints import CheckpointStore, DamagedCheckpoint, TrainState, read_state
from rag_retrieval.train.run_folder import RUN_FILE, WRITTEN, OutputFolderError, check_free, read_run

logger = logging.getLogger(__name__)


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
        if state.run_id == earlier.get("run_id") or (in_place and not earlier):  # a damaged run file is written anew
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
            f"resume: no complete checkpoint is left in {store.folder}, {damaged} are damaged. Start anew with "
            "--overwrite_output_dir true and without --resume, which removes them, or in another output_dir"
        )


def _check_no_orphans(output_dir: Path) -> None:
    """Raises OutputFolderError where there are complete checkpoints but no record of their run: starting anew beside
    them would silently lose them."""
    for folder in output_dir.glob("checkpoint-*"):
        try:
            read_state(folder)
        except DamagedCheckpoint:
            continue
        raise OutputFolderError(
            f"resume: {output_dir / RUN_FILE} is missing or damaged, though there are checkpoints such as {folder}; "
            f"name the one to go on from (--resume {folder}), or take another output_dir"
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
            "the best checkpoint so far, step %d, is gone (%s): the best is decided anew", state.best_step, damage
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
