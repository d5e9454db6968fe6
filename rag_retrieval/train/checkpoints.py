"""Checkpoints of one run: written under a temporary name, flushed, renamed when complete, rotated afterwards.

`trainer_state.json` is written last and names every other file with a digest, and has one of its own: a folder without
it, with other files or with changed ones is not complete. A digest reads at most 256 MiB of a file, evenly spread, so
that large checkpoints are not read again as a whole at every save. Only real folders `checkpoint-N` or
`checkpoint-N-ID` whose state file has this run's id and step N are ever counted, replaced or removed; where another run
has the name `checkpoint-N`, ours is `checkpoint-N-ID`, ID being the first eight characters of the run's id.
"""

import json
import logging
import os
import re
import shutil
import zlib
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from rag_retrieval.core.distributed import on_main
from rag_retrieval.core.files import content_digest, flush_one, flush_to_disk, is_real_folder, read_json, write_json
from rag_retrieval.train.failures import translate_storage_errors
from rag_retrieval.train.run_folder import Provenance
from rag_retrieval.train.task import Task, TrainingError

logger = logging.getLogger(__name__)

STATE_FILE = "trainer_state.json"
NAME = re.compile(r"checkpoint-(\d+)(?:-(.{8}))?")
SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)  # they keep their own copy of the weights


class DamagedCheckpoint(ValueError):
    """Names the folder and the first thing in it that is not as it was written."""


@dataclass
class TrainState:
    """Where a run stands. `step` counts optimizer steps done, `best_metric` is the best evaluation's so far.

    steps_per_epoch: 0 until the data are known; a resumed run must have the same. evaluated_step: the last step
    that was evaluated; a run that is stopped by a signal saves before it evaluates.
    """

    run_id: str
    step: int = 0
    steps_per_epoch: float = 0
    best_metric: float | None = None
    best_step: int | None = None
    stale_evaluations: int = 0
    evaluated_step: int = 0


def read_state(folder: Path) -> TrainState:
    """The state in a complete checkpoint folder. Raises DamagedCheckpoint; reads the digests of all its files."""
    values = read_json(folder / STATE_FILE)
    if not values:
        raise DamagedCheckpoint(f"{folder}: {STATE_FILE} is missing or cannot be read")
    written = values.get("files")
    if not isinstance(written, dict) or any(field.name not in values for field in fields(TrainState)):
        raise DamagedCheckpoint(f"{folder}: {STATE_FILE} is not one of this trainer")
    if values.pop("digest", None) != digest_of(values):
        raise DamagedCheckpoint(f"{folder}: {STATE_FILE} is not as it was written")
    present = file_digests(folder)
    wrong = [name for name in sorted(present.keys() | written.keys()) if present.get(name) != written.get(name)]
    if wrong:
        what = "is missing" if wrong[0] not in present else "is not as it was written"
        raise DamagedCheckpoint(f"{folder}: {wrong[0]} {what}")
    return TrainState(**{field.name: values[field.name] for field in fields(TrainState)})


def write_state(folder: Path, state: TrainState) -> None:
    values = asdict(state) | {"files": file_digests(folder)}
    write_json(folder / STATE_FILE, values | {"digest": digest_of(values)})


def digest_of(values: dict[str, Any]) -> str:
    return f"{zlib.crc32(json.dumps(values, sort_keys=True).encode()):08x}"


def file_digests(folder: Path) -> dict[str, str]:
    """`content_digest` of every file under `folder` but the state file, by its relative name."""
    files = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}
    # with a process killed in `update`, its temporary file may lie there
    others = {name: path for name, path in files.items() if not name.startswith((STATE_FILE, f".{STATE_FILE}."))}
    return {name: content_digest([path]) for name, path in others.items()}


class CheckpointStore:
    """The checkpoints of one run under `folder`: the newest `keep` (at least 1) and the best."""

    def __init__(self, folder: Path, run_id: str, keep: int):
        self.folder, self.run_id, self.keep = folder, run_id, keep

    def path(self, step: int) -> Path:
        """Where this run's checkpoint of that step is, or would be."""
        plain = self.folder / f"checkpoint-{step}"
        if os.path.lexists(plain) and not self._is_own(plain):
            return self.folder / f"checkpoint-{step}-{self.run_id[:8]}"
        return plain

    def temporary(self, step: int) -> Path:
        """Where it is written before it gets its name, and where it goes to be removed. The name marks it as ours."""
        return self.folder / f".checkpoint-{step}-{self.run_id[:8]}.incomplete"

    def own(self) -> list[tuple[int, Path]]:
        """(step, folder) of this run's checkpoints, damaged ones included, oldest first."""
        return sorted((_step_of(folder), folder) for folder in self.folder.glob("checkpoint-*") if self._is_own(folder))

    def _is_own(self, folder: Path) -> bool:
        """Whether it is exactly what this run writes: no copy under another name, and no link to a folder elsewhere."""
        match = NAME.fullmatch(folder.name)
        if match is None or match[2] not in (None, self.run_id[:8]) or not is_real_folder(folder):
            return False
        values = read_json(folder / STATE_FILE)
        return (values.get("run_id"), values.get("step")) == (self.run_id, int(match[1]))

    def begin(self, step: int) -> None:
        """Make an empty folder to write into. Main process only, as is `commit`.

        Raises FileNotFoundError where the output folder is gone: a new one would lack what was in it.
        """
        self.discard(step)
        self.temporary(step).mkdir()

    def discard(self, step: int) -> None:
        """Remove what was written under the temporary name for that step, if anything."""
        shutil.rmtree(self.temporary(step), ignore_errors=True)

    def commit(self, state: TrainState) -> Path:
        """Complete the folder, give it its name, and remove what is no longer kept."""
        temporary, final = self.temporary(state.step), self.path(state.step)
        write_state(temporary, state)
        flush_to_disk(temporary)
        os.replace(temporary, final)
        flush_one(self.folder)
        self._rotate(state.best_step)
        return final

    def update(self, state: TrainState) -> bool:
        """Rewrite the state of the step's checkpoint where that is complete: a run that was stopped saves before it
        evaluates, and evaluates when it is resumed. Returns False where there is no such checkpoint."""
        folder = self.path(state.step)
        try:
            read_state(folder)
        except DamagedCheckpoint:
            return False
        write_state(folder, state)
        self._rotate(state.best_step)
        return True

    def _rotate(self, best_step: int | None) -> None:
        for step, folder in self.own()[: -self.keep]:
            if step != best_step:
                self.remove(folder)

    def remove(self, folder: Path) -> None:
        """Remove one of this run's folders. It loses its name first, so that a process killed in the middle leaves
        nothing that looks like a checkpoint."""
        step = _step_of(folder)
        self.discard(step)
        os.replace(folder, self.temporary(step))
        shutil.rmtree(self.temporary(step))

    def remove_incomplete(self) -> None:
        """Remove what a killed process of this run left half written or half removed."""
        for folder in self.folder.glob(f".checkpoint-*-{self.run_id[:8]}.incomplete"):
            if is_real_folder(folder):
                shutil.rmtree(folder)

    def remove_after(self, step: int) -> None:
        """Remove what this run wrote beyond `step`, where it resumes from an earlier checkpoint."""
        self.remove_incomplete()
        for later, folder in self.own():
            if later > step:
                logger.info("%s is removed: the run goes back to step %d", folder, step)
                self.remove(folder)

    def newest(self) -> tuple[TrainState, Path] | None:
        """The state and folder of the last complete checkpoint; None without one. Damaged ones are named, also those
        that may be another run's."""
        named = [folder for folder in self.folder.glob("checkpoint-*") if NAME.fullmatch(folder.name)]
        for folder in sorted(named, key=_step_of, reverse=True):
            try:
                state = read_state(folder)
            except DamagedCheckpoint as damage:
                logger.warning("damaged checkpoint passed over: %s", damage)
                continue
            if self._is_own(folder):
                return state, folder
        return None


def _step_of(folder: Path) -> int:
    return int(NAME.fullmatch(folder.name)[1])


class Saver:
    """Writes and reads checkpoints, all processes together. model, optimizer: as `accelerator.prepare` returned them.

    Weights stand in a checkpoint as a model folder; accelerate saves only what lies beside them.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        task: Task,
        store: CheckpointStore,
        provenance: Provenance,
    ):
        self.accelerator, self.model, self.optimizer, self.task = accelerator, model, optimizer, task
        self.store, self.provenance = store, provenance
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def save(self, state: TrainState, again: bool = False) -> Path:
        """Model, optimizer, scaler, random states of every process, the run's state and provenance; all or nothing.

        again: whether this process has saved or loaded this very step before. Raises ProcessFailure where a file cannot
        be written; what was half written is removed then.
        """
        try:
            with translate_storage_errors(self.store.folder):
                if not (again and on_main(lambda: self.store.update(state))):
                    self._write(state)
        except BaseException:
            if self.accelerator.is_main_process:
                self.store.discard(state.step)
            raise
        return self.store.path(state.step)

    def _write(self, state: TrainState) -> None:
        temporary, main = self.store.temporary(state.step), self.accelerator.is_main_process
        if main:
            self.store.begin(state.step)
            self.provenance.save(temporary)
        self.accelerator.wait_for_everyone()
        self.save_model(temporary / "model", state.step)
        self.accelerator.save_state(str(temporary))
        self.accelerator.wait_for_everyone()
        if main:
            self.store.commit(state)
        self.accelerator.wait_for_everyone()

    def save_model(self, folder: Path, step: int) -> None:
        """Raises TrainingError, on the main process, where weights are not finite."""
        state_dict = self.accelerator.get_state_dict(self.model)  # on every process: sharding engines gather here
        if not self.accelerator.is_main_process:
            return
        # the last update's effect is seen by no later loss
        broken = [name for name, value in state_dict.items() if not torch.isfinite(value).all()]
        if broken:
            raise TrainingError(
                f"after step {step} weights are not finite ({', '.join(broken[:5])}) and are not saved; "
                "earlier checkpoints are intact. Lower lr, lengthen the warmup, or set max_grad_norm"
            )
        self.task.save_model(folder, state_dict)

    def load(self, folder: Path) -> None:
        """Bring model, optimizer, scaler and random states to where `folder` was written. A loaded optimizer brings its
        old learning rate, decay and betas along: those of this run's configuration are put back."""
        options = [{key: value for key, value in group.items() if key != "params"} for group in self._groups]
        if self.accelerator.distributed_type not in SHARDING:
            self.task.load_model(folder / "model")
        self.accelerator.load_state(str(folder))
        for group, of_this_run in zip(self._groups, options, strict=True):
            group.update(of_this_run)

    @property
    def _groups(self) -> list[dict]:
        return self.optimizer.param_groups
