"""Checkpoint folders of one run: written aside, renamed when complete, rotated afterwards.

What a reader would get wrong: a folder named `checkpoint-300` is not ours because of its name. Only folders
whose `trainer_state.json` carries this run's id are ever counted, replaced or removed; where a stranger has
the name, ours is `checkpoint-300-<id>`.
"""

import json
import logging
import os
import shutil
from dataclasses import asdict, dataclass, fields
from pathlib import Path

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"


@dataclass
class TrainState:
    """Where a run stands. `step` counts optimizer steps done, `best_metric` is the best evaluation's so far.

    steps_per_epoch: 0 until the data are known; a resumed run must have the same.
    """

    run_id: str
    step: int = 0
    steps_per_epoch: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    stale_evaluations: int = 0


def write_json(path: Path, values: dict) -> None:
    """Whole or not at all: written aside, flushed to disk, renamed."""
    aside = path.with_name(path.name + ".tmp")
    with aside.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(aside, path)


def read_json(path: Path) -> dict:
    """The object in the file; {} where it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return values if isinstance(values, dict) else {}


def read_state(folder: Path) -> TrainState | None:
    """The state in a checkpoint folder; None where it is missing or a file is not as it was written."""
    values = read_json(folder / STATE_FILE)
    names = [field.name for field in fields(TrainState)]
    if not {*names, "files"} <= values.keys() or values["files"] != file_sizes(folder):
        return None
    return TrainState(**{name: values[name] for name in names})


def file_sizes(folder: Path) -> dict[str, int]:
    """Bytes of every file under `folder` but the state file, by its relative name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sizes = {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}
    sizes.pop(STATE_FILE, None)
    return sizes


class CheckpointStore:
    """The checkpoints of one run under `folder`: the newest `keep` (at least 1) and the best."""

    def __init__(self, folder: Path, run_id: str, keep: int):
        self.folder, self.run_id, self.keep = folder, run_id, keep

    def path(self, step: int) -> Path:
        """Where this run's checkpoint of that step is, or would be."""
        plain = self.folder / f"checkpoint-{step}"
        if plain.exists() and not self._is_own(plain):
            return self.folder / f"checkpoint-{step}-{self.run_id[:8]}"
        return plain

    def aside(self, step: int) -> Path:
        """Where it is written before it gets its name."""
        return self.folder / f".checkpoint-{step}-{self.run_id[:8]}.incomplete"

    def own(self) -> list[tuple[int, Path]]:
        """(step, folder) of this run's checkpoints, damaged ones included, oldest first."""
        folders = [folder for folder in self.folder.glob("checkpoint-*") if self._is_own(folder)]
        return sorted((read_json(folder / STATE_FILE).get("step", 0), folder) for folder in folders)

    def _is_own(self, folder: Path) -> bool:
        return read_json(folder / STATE_FILE).get("run_id") == self.run_id

    def begin(self, step: int) -> None:
        """Make an empty folder to write into, marked as this run's. Main process only, as is `commit`."""
        aside = self.aside(step)
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
        write_json(aside / STATE_FILE, {"run_id": self.run_id, "step": step})

    def commit(self, state: TrainState) -> Path:
        """Complete the folder, give it its name, and remove what is no longer kept."""
        aside, final = self.aside(state.step), self.path(state.step)
        write_json(aside / STATE_FILE, asdict(state) | {"files": file_sizes(aside)})
        if final.exists():
            shutil.rmtree(final)
        os.replace(aside, final)
        self._rotate(state.best_step)
        return final

    def _rotate(self, best_step: int | None) -> None:
        for step, folder in self.own()[: -self.keep]:
            if step != best_step:
                shutil.rmtree(folder)

    def remove_incomplete(self) -> None:
        """Remove what a killed process of this run left half written."""
        for folder in self.folder.glob(".checkpoint-*.incomplete"):
            if self._is_own(folder):
                shutil.rmtree(folder)

    def remove_after(self, step: int) -> None:
        """Remove what this run wrote beyond `step`, where it goes on from an earlier checkpoint."""
        self.remove_incomplete()
        for later, folder in self.own():
            if later > step:
                logger.info("%s is removed: the run goes back to step %d", folder, step)
                shutil.rmtree(folder)

    def newest(self) -> tuple[TrainState, Path] | None:
        """The state and folder of the last complete checkpoint; None without one. Damaged ones are named."""
        for folder in self.folder.glob("checkpoint-*"):
            if (folder / STATE_FILE).exists() and not read_json(folder / STATE_FILE):
                logger.warning("%s has a %s that cannot be read; passed over", folder, STATE_FILE)
        for _, folder in reversed(self.own()):
            state = read_state(folder)
            if state is not None:
                return state, folder
            logger.warning("%s is damaged (a file is missing or of another size); passed over", folder)
        return None
