"""Checkpoint folders of one run: written aside, renamed when complete, rotated afterwards.

What a reader would get wrong: a folder named `checkpoint-300` is not ours because of its name. Only folders whose
`trainer_state.json` carries this run's id are ever counted, kept or removed.
"""

import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
RUN_FILE = "run.json"


class OutputFolderError(ValueError):
    """The output folder holds something that this run must not touch."""


@dataclass
class TrainState:
    """Where a run stands. `step` counts optimizer steps done; metrics are those of the best evaluation so far."""

    run_id: str
    step: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    stale_evaluations: int = 0

    def save(self, folder: Path) -> None:
        write_json(folder / STATE_FILE, asdict(self))

    @classmethod
    def load(cls, folder: Path) -> "TrainState":
        values = json.loads((folder / STATE_FILE).read_text(encoding="utf-8"))
        return cls(**{field.name: values[field.name] for field in fields(cls)})


def write_json(path: Path, values: dict) -> None:
    """Whole or not at all: written aside, flushed to disk, renamed."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_state(folder: Path) -> TrainState | None:
    """The state in a checkpoint folder; None where it is missing or damaged."""
    try:
        return TrainState.load(folder)
    except (OSError, ValueError, KeyError):
        return None


class CheckpointStore:
    """The checkpoints of one run under `folder`, at most `keep` of them besides the best."""

    def __init__(self, folder: Path, run_id: str, keep: int):
        self.folder, self.run_id, self.keep = folder, run_id, keep

    def path(self, step: int) -> Path:
        return self.folder / f"checkpoint-{step}"

    def aside(self, step: int) -> Path:
        return self.folder / f".checkpoint-{step}.incomplete"

    def own(self) -> list[tuple[int, Path]]:
        """(step, folder) of this run's complete checkpoints, oldest first."""
        found = [(read_state(folder), folder) for folder in self.folder.glob("checkpoint-*") if folder.is_dir()]
        return sorted((state.step, folder) for state, folder in found if state and state.run_id == self.run_id)

    def begin(self, step: int) -> Path:
        """An empty folder to write into, on the main process."""
        aside = self.aside(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        return aside

    def commit(self, state: TrainState) -> Path:
        """Mark the folder as this run's, give it its name, and remove what is no longer kept."""
        aside, final = self.aside(state.step), self.path(state.step)
        state.save(aside)
        if final.exists():
            known = read_state(final)
            if known is None or known.run_id != self.run_id:
                raise OutputFolderError(f"{final} exists and is not of this run; move it away or take another output_dir")
            shutil.rmtree(final)
        os.replace(aside, final)
        self._rotate(state.best_step)
        return final

    def _rotate(self, best_step: int | None) -> None:
        own = self.own()
        for step, folder in own[: -self.keep]:
            if step != best_step:
                shutil.rmtree(folder)


def newest_checkpoint(folder: Path) -> Path | None:
    """The complete checkpoint with the most steps of the run that `folder` belongs to; None without one.

    A checkpoint folder whose state cannot be read is passed over with a warning that names it.
    """
    run = read_run(folder)
    best: tuple[int, Path] | None = None
    for candidate in folder.glob("checkpoint-*"):
        state = read_state(candidate)
        if state is None:
            logger.warning("%s has no readable %s; passed over", candidate, STATE_FILE)
        elif state.run_id == (run and run["run_id"]) and (best is None or state.step > best[0]):
            best = (state.step, candidate)
    return best and best[1]


def read_run(output_dir: Path) -> dict | None:
    try:
        return json.loads((output_dir / RUN_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def begin_run(output_dir: Path, overwrite: bool) -> TrainState:
    """Mark the output folder as a new run's and return the run's first state.

    Raises OutputFolderError when it holds another run already, unless `overwrite`: then that run's checkpoints,
    metrics and model are removed, and nothing else.
    """
    earlier = read_run(output_dir)
    if earlier is not None and not overwrite:
        raise OutputFolderError(
            f"{output_dir} already holds a run. Go on with it: --resume auto. Keep it: another --output_dir. "
            "Replace it: --overwrite_output_dir true"
        )
    if earlier is not None:
        _remove_run(output_dir, earlier["run_id"])
    run_id = uuid.uuid4().hex
    output_dir.mkdir(parents=True, exist_ok=True)
    write_json(output_dir / RUN_FILE, {"run_id": run_id, "finished": False})
    return TrainState(run_id)


def finish_run(output_dir: Path, run_id: str) -> None:
    write_json(output_dir / RUN_FILE, {"run_id": run_id, "finished": True})


def _remove_run(output_dir: Path, run_id: str) -> None:
    for _, folder in CheckpointStore(output_dir, run_id, keep=1).own():
        shutil.rmtree(folder)
    for name in ("model", "adapter"):
        shutil.rmtree(output_dir / name, ignore_errors=True)
    (output_dir / "metrics.jsonl").unlink(missing_ok=True)


def replace_folder(final: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a folder aside, then put it in the place of `final`."""
    aside, old = (final.with_name(f".{final.name}.{end}") for end in ("incomplete", "old"))
    for folder in (aside, old):
        shutil.rmtree(folder, ignore_errors=True)
    aside.mkdir(parents=True)
    write(aside)
    if final.exists():
        os.replace(final, old)
    os.replace(aside, final)
    shutil.rmtree(old, ignore_errors=True)
