"""The training loop: steps, evaluations, checkpoints. It knows nothing of what is trained.

A `Task` computes the summed loss of a micro-batch; the loop divides by the count over the whole optimizer step,
over micro-batches and processes. So 1 process with batch 32, 2 with 16, and 8 with accumulation 4 take the same
step. "Step" always means optimizer step.
"""

import logging
import math
import shutil
import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType
from torch import nn

from rag_retrieval.train.checkpoints import CheckpointStore, TrainState, finish_run
from rag_retrieval.train.schedule import warmup_stable_cosine
from rag_retrieval.train.step_data import MicroBatch, StepDataset, step_loader
from rag_retrieval.train.tracking import Tracking

logger = logging.getLogger(__name__)


class TrainingError(RuntimeError):
    """Training cannot go on; the weights of the last checkpoint are intact."""


class Task(Protocol):
    """What the loop must be told of the thing it trains."""

    def loss_sum(self, model: nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        """The summed loss of one micro-batch: float32 scalar with a graph."""

    def report(self) -> dict[str, float]:
        """Further values over the steps since the last report, for the log."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Metrics on validation data, equal on all processes; called in eval mode without gradients."""

    def save_model(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        """Write the weights so that `load_model` and `export` can read them (main process only)."""

    def load_model(self, folder: Path) -> None:
        """Bring the bare model to the weights that `save_model` wrote."""

    def export(self, folder: Path, output_dir: Path) -> None:
        """Make the finished model in output_dir of what `save_model` wrote (main process only)."""


@dataclass(frozen=True)
class LoopSettings:
    """Counts are optimizer steps unless they say otherwise; None switches a thing off."""

    epochs: int
    warmup_proportion: float
    stable_proportion: float
    max_grad_norm: float | None
    log_interval: int
    num_workers: int
    num_max_checkpoints: int
    save_steps: int | None = None
    save_on_epoch_end: bool = True
    evaluates: bool = False
    eval_steps: int | None = None
    eval_on_start: bool = False
    metric_for_best_model: str | None = None
    early_stopping_patience: int | None = None


class Trainer:
    """Trains `model` on the steps of `dataset`. `train()` starts or goes on where `state` stands."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: StepDataset,
        task: Task,
        settings: LoopSettings,
        output_dir: Path,
        state: TrainState,
        run_config: dict,
    ):
        self.accelerator, self.dataset, self.task, self.settings = accelerator, dataset, task, settings
        self.output_dir, self.state, self.run_config = output_dir, state, run_config
        self.peak_lrs = [group["lr"] for group in optimizer.param_groups]
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.total_steps = dataset.steps_per_epoch * settings.epochs
        self.checkpoints = CheckpointStore(output_dir, state.run_id, settings.num_max_checkpoints)
        self.saved_step = state.step
        self.evaluated_step: int | None = None
        # weights stand in the checkpoint as a model folder; accelerate saves only what lies beside them
        accelerator.register_save_state_pre_hook(lambda models, weights, folder: weights.clear())
        accelerator.register_load_state_pre_hook(lambda models, folder: models.clear())

    def train(self) -> TrainState:
        """Run until the last step or an early stop, and write the final model. Returns the final state."""
        done, settings = self.state.step, self.settings
        self.tracking = Tracking(self.accelerator, self.output_dir, self.total_steps, done, self.run_config)
        self._start_window()
        if settings.eval_on_start and done == 0:
            self.evaluate()
        loader = step_loader(
            self.dataset, settings.epochs, done, settings.num_workers, pin_memory=self.accelerator.device.type == "cuda"
        )
        self.model.train()
        self._start_window()
        for micro_batches in loader:
            self.train_step(micro_batches)
            self.tracking.step_done()
            self._log_if_due()
            self._evaluate_if_due()
            self._save_if_due()
            if self.should_stop():
                self.tracking.say(
                    f"early stop: {settings.metric_for_best_model} has not improved on step "
                    f"{self.state.best_step} in {self.state.stale_evaluations} evaluations"
                )
                break
        self._finish()
        return self.state

    def train_step(self, micro_batches: list[MicroBatch]) -> None:
        """One optimizer step over all micro-batches of all processes."""
        learning_rate_factor = warmup_stable_cosine(
            self.state.step, self.total_steps, self.settings.warmup_proportion, self.settings.stable_proportion
        )
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * learning_rate_factor
        loss = self.forward_backward(micro_batches)
        norm = self._clip_gradients()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        self.window.add(loss, norm, sum(batch.size for batch in micro_batches), self.optimizer.param_groups[0]["lr"])

    def forward_backward(self, micro_batches: list[MicroBatch]) -> torch.Tensor:
        """Accumulate the gradient of the mean loss over the step's items; returns that mean (detached).

        Engines average gradients over processes, hence the factor num_processes. The loss is looked at before
        the last backward, so that one that is not finite reaches neither gradients' exchange nor weights.
        """
        accelerator = self.accelerator
        items = torch.tensor(sum(batch.items for batch in micro_batches), device=accelerator.device)
        # a step without any item (no ordered pair at all) has loss 0 and gradient 0
        divisor = max(int(accelerator.reduce(items, "sum")), 1)
        losses = []
        for position, batch in enumerate(micro_batches):
            last = position == len(micro_batches) - 1
            accelerator.sync_gradients = last
            with nullcontext() if last else accelerator.no_sync(self.model):
                loss = self.task.loss_sum(self.model, batch.to(accelerator.device))
                losses.append(loss.detach())
                if last:
                    mean = accelerator.reduce(torch.stack(losses).sum(), "sum") / divisor
                    self._check_finite(mean, losses, micro_batches)
                accelerator.backward(loss * (accelerator.num_processes / divisor))
        return mean

    def _check_finite(self, mean: torch.Tensor, losses: list[torch.Tensor], micro_batches: list[MicroBatch]) -> None:
        if math.isfinite(mean.item()):
            return
        step = self.state.step + 1
        bad = [batch for loss, batch in zip(losses, micro_batches, strict=True) if not math.isfinite(loss.item())]
        sources = [source for batch in bad for source in batch.sources]
        where = ", ".join(sources[:20]) + (f" and {len(sources) - 20} more" if len(sources) > 20 else "")
        raise TrainingError(
            f"the loss of step {step} is {mean.item()}; no weight was changed by it. "
            + (f"Records of the micro-batches at fault: {where}. " if bad else "Another process had it. ")
            + "Lower lr or max_grad_norm, lengthen the warmup, or train in mixed_precision bf16 or no instead of fp16; "
            "if it happens in the first steps, look at the records and at the checkpoint you start from"
        )

    def _clip_gradients(self) -> torch.Tensor | None:
        """Clip to max_grad_norm and return the norm before; an infinite or NaN one stops the run, except under
        fp16, where the gradient scaler skips such a step and lowers its scale."""
        limit = self.settings.max_grad_norm
        if limit is None:
            limit = math.inf
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), limit)
        if norm is None:
            return None
        norm = torch.as_tensor(norm)
        if self.accelerator.mixed_precision != "fp16" and not math.isfinite(norm.item()):
            raise TrainingError(
                f"the gradient norm of step {self.state.step + 1} is {norm.item()} though the loss is finite; no weight "
                "was changed by it. Lower lr, or train in mixed_precision no"
            )
        return norm

    def should_stop(self) -> bool:
        patience = self.settings.early_stopping_patience
        return patience is not None and self.state.stale_evaluations >= patience

    # --- what happens between steps ---

    def _start_window(self) -> None:
        self.window = LogWindow(self.accelerator.num_processes)

    def _log_if_due(self) -> None:
        step = self.state.step
        if step % self.settings.log_interval and step != self.total_steps:
            return
        values = {"epoch": round(step / self.dataset.steps_per_epoch, 4), **self.window.values(), **self.task.report()}
        self.tracking.train(step, values)
        self._start_window()

    def _at_epoch_end(self) -> bool:
        return self.state.step % self.dataset.steps_per_epoch == 0

    def _evaluate_if_due(self) -> None:
        every = self.settings.eval_steps
        due = self._at_epoch_end() if every is None else self.state.step % every == 0
        if self.settings.evaluates and (due or self.state.step == self.total_steps):
            started = time.monotonic()
            self.evaluate()
            self.window.pause(time.monotonic() - started)

    def evaluate(self) -> None:
        """Evaluate, report, and note (with a checkpoint) whether this is the best so far."""
        self.model.eval()
        with torch.no_grad():
            values = self.task.evaluate(self.model)
        self.model.train()
        self.evaluated_step = self.state.step
        metric = self.settings.metric_for_best_model
        improved = self.state.step > 0 and self._note_best(values[metric])
        self.tracking.evaluation(self.state.step, values, f"  (best {metric} so far)" if improved else "")
        if improved:
            self.save_checkpoint()

    def _note_best(self, value: float) -> bool:
        best = self.state.best_metric
        lower_is_better = self.settings.metric_for_best_model == "loss"
        improved = best is None or (value < best if lower_is_better else value > best)
        if improved:
            self.state.best_metric, self.state.best_step, self.state.stale_evaluations = value, self.state.step, 0
        else:
            self.state.stale_evaluations += 1
        return improved

    def _save_if_due(self) -> None:
        every = self.settings.save_steps
        due = every is not None and self.state.step % every == 0
        if (due or (self.settings.save_on_epoch_end and self._at_epoch_end())) and self.saved_step != self.state.step:
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """Model, optimizer, scaler, random states of every process and `trainer_state.json`, all or nothing."""
        started = time.monotonic()
        accelerator, step = self.accelerator, self.state.step
        if accelerator.is_main_process:
            self.checkpoints.begin(step)
        accelerator.wait_for_everyone()
        aside = self.checkpoints.aside(step)
        state_dict = accelerator.get_state_dict(self.model)
        if accelerator.is_main_process:
            self.task.save_model(aside / "model", state_dict)
        accelerator.save_state(str(aside))
        accelerator.wait_for_everyone()
        if accelerator.is_main_process:
            final = self.checkpoints.commit(self.state)
            self.tracking.say(f"checkpoint: {final}")
        accelerator.wait_for_everyone()
        self.saved_step = step
        self.window.pause(time.monotonic() - started)

    def load_checkpoint(self, folder: Path) -> None:
        """Bring model, optimizer, scaler and random states to where `folder` was written."""
        if self.accelerator.distributed_type not in (DistributedType.FSDP, DistributedType.DEEPSPEED):
            self.task.load_model(folder / "model")  # the sharding engines keep their own copy of the weights
        self.accelerator.load_state(str(folder))

    def _finish(self) -> None:
        """Write the final model: the best checkpoint's weights where a metric chose one, else the last."""
        state, accelerator = self.state, self.accelerator
        if state.best_step not in (None, state.step):
            self.tracking.say(f"final model: step {state.best_step}, the best {self.settings.metric_for_best_model}")
            saved = self.checkpoints.path(state.best_step) / "model"
        else:
            saved = self.output_dir / ".final"
            state_dict = accelerator.get_state_dict(self.model)
            if accelerator.is_main_process:
                self.task.save_model(saved, state_dict)
        if accelerator.is_main_process:
            self.task.export(saved, self.output_dir)
            shutil.rmtree(self.output_dir / ".final", ignore_errors=True)
            finish_run(self.output_dir, state.run_id)
        accelerator.wait_for_everyone()
        self.tracking.close()


class LogWindow:
    """Means over the steps since the last log. Sums stay on the device until they are asked for."""

    def __init__(self, num_processes: int):
        self.num_processes = num_processes
        self.started = time.monotonic()
        self.losses: list[torch.Tensor] = []
        self.norm: torch.Tensor | None = None
        self.pairs = 0
        self.lr = 0.0

    def add(self, loss: torch.Tensor, norm: torch.Tensor | None, pairs: int, lr: float) -> None:
        self.losses.append(loss)
        self.norm, self.lr = norm, lr
        self.pairs += pairs

    def pause(self, seconds: float) -> None:
        """Take time that was not spent on steps out of the throughput."""
        self.started += seconds

    def values(self) -> dict[str, float]:
        """loss: mean over steps; lr and grad_norm: of the last step; pairs_per_second: over all processes."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        values = {
            "loss": torch.stack(self.losses).mean().item(),
            "lr": self.lr,
            "pairs_per_second": self.pairs * self.num_processes / seconds,
        }
        if self.norm is not None:
            values["grad_norm"] = self.norm.item()
        return values
