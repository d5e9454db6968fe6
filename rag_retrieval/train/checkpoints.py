"""Checkpoint folders of one run: written aside, flushed, renamed when complete, rotated afterwards.

What a reader would get wrong: a folder named `checkpoint-300` is not ours because of its name. Only folders
whose `trainer_state.json` carries this run's id are ever counted, replaced or removed; where a stranger has
the name, ours is `checkpoint-300-<id>`. And a folder is not complete because it has that file: every file must
have the size and the CRC-32 that are noted there, the note itself included.
"""

import errno
import json
import logging
import os
import shutil
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path

from rag_retrieval.core.files import replacing

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
READ_AT_ONCE = 1 << 24  # bytes


class DamagedCheckpoint(ValueError):
    """Names the folder and the first thing in it that is not as it was written."""


@dataclass
class TrainState:
    """Where a run stands. `step` counts optimizer steps done, `best_metric` is the best evaluation's so far.

    steps_per_epoch: 0 until the data are known; a resumed run must have the same. evaluated_step: the last step
    that was evaluated; a run that is told to stop saves before it evaluates.
    """

    run_id: str
    step: int = 0
    steps_per_epoch: int = 0
    best_metric: float | None = None
    best_step: int | None = None
    stale_evaluations: int = 0
    evaluated_step: int = 0


def write_json(path: Path, values: dict) -> None:
    """Whole or not at all: written aside, flushed to disk, renamed."""
    with replacing(path) as aside, aside.open("w", encoding="utf-8") as file:
        json.dump(values, file, indent=2)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict:
    """The object in the file; {} where it is missing or damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def read_state(folder: Path) -> TrainState:
    """The state in a complete checkpoint folder. Raises DamagedCheckpoint; reads every byte of the folder."""
    noted = read_json(folder / STATE_FILE)
    if not noted:
        raise DamagedCheckpoint(f"{folder}: {STATE_FILE} is missing or cannot be read")
    if noted.pop("checksum", None) != checksum_of(noted):
        raise DamagedCheckpoint(f"{folder}: {STATE_FILE} is not as it was written")
    try:
        found = file_checksums(folder)
    except OSError as error:
        raise DamagedCheckpoint(f"{folder}: cannot be read: {error}") from None
    names = sorted(found.keys() | noted["files"].keys())
    wrong = [name for name in names if found.get(name) != noted["files"].get(name)]
    if wrong:
        what = "is missing" if wrong[0] not in found else "is not as it was written"
        raise DamagedCheckpoint(f"{folder}: {wrong[0]} {what}")
    return TrainState(**{field.name: noted[field.name] for field in fields(TrainState)})


def checksum_of(values: dict) -> int:
    return zlib.crc32(json.dumps(values, sort_keys=True).encode())


def file_checksums(folder: Path) -> dict[str, list[int]]:
    """[bytes, CRC-32] of every file under `folder` but the state file, by its relative name."""
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    sums = {path.relative_to(folder).as_posix(): _size_and_crc(path) for path in files}
    sums.pop(STATE_FILE, None)
    return sums


def _size_and_crc(path: Path) -> list[int]:
    size = crc = 0
    with path.open("rb") as file:
        while part := file.read(READ_AT_ONCE):
            size, crc = size + len(part), zlib.crc32(part, crc)
    return [size, crc]


def flush(folder: Path) -> None:
    """Bring everything under `folder`, names included, from the system's memory to the disk."""
    for path in [*folder.rglob("*"), folder]:
        _flush_one(path)


def _flush_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in (errno.EINVAL, errno.ENOTSUP)):  # some network disks know no such
            raise
    finally:
        os.close(descriptor)


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
        """Where it is written before it gets its name, and where it goes to be removed."""
        return self.folder / f".checkpoint-{step}-{self.run_id[:8]}.incomplete"

    def own(self) -> list[tuple[int, Path]]:
        """(step, folder) of this run's checkpoints, damaged ones included, oldest first."""
        folders = [folder for folder in self.folder.glob("checkpoint-*") if self._is_own(folder)]
        return sorted((_noted_step(folder), folder) for folder in folders)

    def _is_own(self, folder: Path) -> bool:
        return read_json(folder / STATE_FILE).get("run_id") == self.run_id

    def begin(self, step: int) -> None:
        """Make an empty folder to write into, marked as this run's. Main process only, as is `commit`.

        Raises FileNotFoundError where the output folder is gone: made anew, it would lack what was in it.
        """
        self.discard(step)
        aside = self.aside(step)
        aside.mkdir()
        write_json(aside / STATE_FILE, {"run_id": self.run_id, "step": step})

    def discard(self, step: int) -> None:
        """Remove what was written aside for that step, if anything."""
        shutil.rmtree(self.aside(step), ignore_errors=True)

    def commit(self, state: TrainState) -> Path:
        """Complete the folder, give it its name, and remove what is no longer kept."""
        aside, final = self.aside(state.step), self.path(state.step)
        noted = asdict(state) | {"files": file_checksums(aside)}
        write_json(aside / STATE_FILE, noted | {"checksum": checksum_of(noted)})
        flush(aside)
        replaced = final.with_name(f"{final.name}-replaced")  # still counts, until the new one has the name
        if final.exists():
            self._remove(replaced)
            os.replace(final, replaced)
        os.replace(aside, final)
        _flush_one(self.folder)
        self._remove(replaced)
        self._rotate(state.best_step)
        return final

    def _rotate(self, best_step: int | None) -> None:
        for step, folder in self.own()[: -self.keep]:
            if step != best_step:
                self._remove(folder)

    def _remove(self, folder: Path) -> None:
        """Remove one of this run's folders. It loses its name first and its mark last, so that a process killed
        in the middle leaves nothing that looks like a checkpoint and nothing without an owner."""
        if not self._is_own(folder):
            return
        going = self.aside(_noted_step(folder))
        shutil.rmtree(going, ignore_errors=True)
        os.replace(folder, going)
        for path in going.iterdir():
            if path.is_dir():
                shutil.rmtree(path)
            elif path.name != STATE_FILE:
                path.unlink()
        shutil.rmtree(going)

    def remove_incomplete(self) -> None:
        """Remove what a killed process of this run left half written or half removed."""
        for folder in self.folder.glob(f".checkpoint-*-{self.run_id[:8]}.incomplete"):
            if read_json(folder / STATE_FILE).get("run_id") in (None, self.run_id):  # the name is a mark, too
                shutil.rmtree(folder)

    def remove_after(self, step: int) -> None:
        """Remove what this run wrote beyond `step`, where it goes on from an earlier checkpoint."""
        self.remove_incomplete()
        for later, folder in self.own():
            if later > step:
                logger.info("%s is removed: the run goes back to step %d", folder, step)
                self._remove(folder)

    def newest(self) -> tuple[TrainState, Path] | None:
        """The state and folder of the last complete checkpoint; None without one. Damaged ones are named."""
        spoilt = {folder for folder in self.folder.glob("checkpoint-*") if _has_spoilt_mark(folder)}
        for folder in sorted(spoilt):
            logger.warning("damaged checkpoint passed over: %s: %s is not as it was written", folder, STATE_FILE)
        for _, folder in reversed(self.own()):
            if folder in spoilt:
                continue
            try:
                return read_state(folder), folder
            except DamagedCheckpoint as damage:
                logger.warning("damaged checkpoint passed over: %s", damage)
        return None


def _has_spoilt_mark(folder: Path) -> bool:
    """Whether the folder has a state file of ours that is not as it was written: neither owner nor step are sure."""
    noted = read_json(folder / STATE_FILE)
    if not noted:
        return (folder / STATE_FILE).exists()
    return "checksum" in noted and noted.pop("checksum") != checksum_of(noted)


def _noted_step(folder: Path) -> int:
    """The step that the folder's state file names; -1, before all others, where it names none."""
    step = read_json(folder / STATE_FILE).get("step")
    return step if isinstance(step, int) else -1
