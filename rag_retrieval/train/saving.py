"""Writing and reading a checkpoint, all processes together.

What a reader would get wrong: weights stand in a checkpoint as a model folder; accelerate saves only what lies
beside them. And a loaded optimizer brings its old learning rate, decay and betas along: those of this run's
configuration are put back.
"""

from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from rag_retrieval.train.checkpoints import CheckpointStore, TrainState
from rag_retrieval.train.failures import told_of_storage
from rag_retrieval.train.provenance import Provenance
from rag_retrieval.train.task import Task, TrainingError

SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED)  # they keep their own copy of the weights


class Saver:
    """model, optimizer: as `accelerator.prepare` returned them. Every method is for all processes at once."""

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

    def save(self, state: TrainState) -> Path:
        """Model, optimizer, scaler, random states of every process, the run's state and provenance; all or nothing.

        Raises ProcessFailure where a file cannot be written; what was half written is removed then.
        """
        try:
            with told_of_storage(self.store.folder):
                self._write(state)
        except BaseException:
            if self.accelerator.is_main_process:
                self.store.discard(state.step)
            raise
        return self.store.path(state.step)

    def _write(self, state: TrainState) -> None:
        aside, main = self.store.aside(state.step), self.accelerator.is_main_process
        if main:
            self.store.begin(state.step)
            self.provenance.save(aside)
        self.accelerator.wait_for_everyone()
        self.save_model(aside / "model", state.step)
        self.accelerator.save_state(str(aside))
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
        """Bring model, optimizer, scaler and random states to where `folder` was written."""
        options = [{key: value for key, value in group.items() if key != "params"} for group in self._groups]
        if self.accelerator.distributed_type not in SHARDING:
            self.task.load_model(folder / "model")
        self.accelerator.load_state(str(folder))
        for group, of_this_run in zip(self._groups, options, strict=True):
            group.update(of_this_run)

    @property
    def _groups(self) -> list[dict]:
        return self.optimizer.param_groups
