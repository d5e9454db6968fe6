"""The training loop: steps, evaluations, checkpoints. It knows nothing of what is trained.

A `Task` yields the losses of an optimizer step, divided by the count of items over all its micro-batches and
processes. So 1 process with batch 32, 2 with 16, and 8 with accumulation 4 take the same step. "Step" always means
optimizer step.

Processes agree to stop in the all-gather at the beginning of a step, so that all stop after the same one. A stopped run
saves before it evaluates; the resumed run evaluates first.
"""

import math
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as distributed
from accelerate import Accelerator
from torch import nn
from torch.distributed.tensor import DTensor

from rag_retrieval.core.distributed import StartError, host_group
from rag_retrieval.core.signals import StopRequest, TrainingStopped, on_signals
from rag_retrieval.train.checkpoints import CheckpointStore, Saver, TrainState
from rag_retrieval.train.config import TrainingConfig
from rag_retrieval.train.failures import (
    is_out_of_memory,
    memory_failure,
    steps_of,
    translate_storage_errors,
    translate_worker_deaths,
)
from rag_retrieval.train.optim import warmup_stable_cosine
from rag_retrieval.train.run_folder import Provenance, finish, publish
from rag_retrieval.train.setup import products_of
from rag_retrieval.train.step_checks import StepChecks, StepOutcome
from rag_retrieval.train.steps import MicroBatch, MixedSteps, step_loader
from rag_retrieval.train.task import Task, weighted_sum
from rag_retrieval.train.tracking import LogWindow, Tracking


class Trainer:
    """Trains `model` on the steps of `dataset`. `train()` starts or continues at `state`."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        dataset: MixedSteps,
        task: Task,
        config: TrainingConfig,
        metric: str | None,
        state: TrainState,
        provenance: Provenance,
    ):
        """metric: a key of what `Task.evaluate` returns, which decides which checkpoint is best; None where nothing is
        evaluated."""
        self.accelerator, self.dataset, self.task, self.config, self.metric = accelerator, dataset, task, config, metric
        self.output_dir, self.state, self.provenance = Path(config.output_dir), state, provenance
        self.peak_lrs = [group["lr"] for group in optimizer.param_groups]
        self.model, self.optimizer = accelerator.prepare(model, optimizer)
        self.total_steps = int(dataset.steps_per_epoch * config.epochs)
        self._check_resumable()
        self.checkpoints = CheckpointStore(self.output_dir, state.run_id, config.num_max_checkpoints)
        self.saver = Saver(accelerator, self.model, self.optimizer, task, self.checkpoints, provenance)
        self.saved_step = state.step
        self.checks = StepChecks(accelerator, optimizer, task.describe_batch)
        self.hosts = host_group(config.wait_minutes)
        self.stop_request, self.agreed_stop = StopRequest(), 0

    def _check_resumable(self) -> None:
        before, now = self.state.steps_per_epoch, float(self.dataset.steps_per_epoch)
        if before not in (0, now):
            raise StartError(
                f"resume: the checkpoint is of a run with {before:.9g} optimizer steps per epoch, and this run "
                f"has {now:.9g}. Keep the training data and the product of batch_size, "
                "gradient_accumulation_steps and processes"
            )
        self.state.steps_per_epoch = now

    def train(self) -> TrainState:
        """Run until the last step or an early stop, and write the final model. Returns the final state.

        Raises TrainingStopped after SIGTERM or SIGINT, ProcessFailure for what strikes this process alone, and
        TrainingError where training cannot continue.
        """
        products = products_of(self.config, self.accelerator)
        with translate_worker_deaths(), on_signals(self.stop_request.note), products:
            self.tracking = Tracking(
                self.accelerator,
                self.output_dir,
                self.total_steps,
                self.state.step,
                self.provenance.configuration,
                self.task.unit,
            )
            try:
                self._run_steps()
                self._finish()
            finally:
                self.tracking.close()
        return self.state

    def _run_steps(self) -> None:
        config, done = self.config, self.state.step
        self.window = LogWindow(self.accelerator.num_processes, self.task.unit)
        if config.eval_on_start and done == 0:
            self.evaluate()
        on_gpu = self.accelerator.device.type == "cuda"
        loader = step_loader(self.dataset, config.epochs, done, config.num_workers)
        self.model.train()
        self._evaluate_if_due()  # where a stop came first
        if self._has_stopped_improving():
            return
        with closing(steps_of(loader, pin_memory=on_gpu)) as steps:
            for micro_batches in steps:
                self.train_step(micro_batches)
                self.tracking.step_done()
                self._log_if_due()
                self._stop_if_asked()
                self._evaluate_if_due()
                self._save_if_due()
                if self._has_stopped_improving():
                    return

    def _stop_if_asked(self) -> None:
        number = self.agreed_stop if self.accelerator.num_processes > 1 else self.stop_request.number
        if not number or self.state.step == self.total_steps:  # what is left is to finish
            return
        self.save_checkpoint()
        folder = self.checkpoints.path(self.state.step)
        raise TrainingStopped(number, self.state.step, self.total_steps, str(folder))

    # --- one step ---

    def train_step(self, micro_batches: list[MicroBatch]) -> None:
        """One optimizer step over all micro-batches of all processes."""
        config = self.config
        factor = warmup_stable_cosine(
            self.state.step, self.total_steps, config.warmup_proportion, config.stable_proportion
        )
        for group, peak in zip(self.optimizer.param_groups, self.peak_lrs, strict=True):
            group["lr"] = peak * factor
        losses, mean = self.forward_backward(micro_batches)
        norm = self._clip_gradients()
        self.checks.guard(mean, norm)
        with self._translate_memory_errors(None):
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.state.step += 1
        lr = self.optimizer.param_groups[0]["lr"]
        self._count_steps(StepOutcome(self.state.step, micro_batches, losses, mean, norm, lr))

    def forward_backward(self, micro_batches: list[MicroBatch]) -> tuple[list[torch.Tensor], torch.Tensor]:
        """Accumulate the gradient of the mean loss over the step's items; returns the summed losses of each
        micro-batch, [losses], and that mean.

        Several losses have a divisor each, and their means are added.
        """
        accelerator = self.accelerator
        items, most = self._count(micro_batches)
        # all processes meet in every micro-batch, also those that planned fewer
        part, missing = micro_batches[0].part, most - len(micro_batches)
        micro_batches = micro_batches + [self.dataset.filler(part) for _ in range(missing)]
        # a step without any item (no ordered pair at all) has loss 0 and gradient 0
        divisors = [max(count, 1) for count in items]
        factors = [accelerator.num_processes / count for count in divisors]
        on_device = [batch.to(accelerator.device) for batch in micro_batches]
        losses = self.task.losses(self.model, on_device, factors, self.state.step)
        all_sums = []
        for position, batch in enumerate(micro_batches):
            last = position == len(micro_batches) - 1
            accelerator.sync_gradients = last
            with self._translate_memory_errors(batch), nullcontext() if last else accelerator.no_sync(self.model):
                loss, sums = next(losses)
                all_sums.append(sums)
                if last:
                    total = accelerator.reduce(torch.stack(all_sums).sum(0), "sum")
                    mean = weighted_sum(total, [1 / count for count in divisors])
                    if not self.checks.skips_on_device:  # DeepSpeed updates weights inside the last backward
                        self.checks.check_loss(self.state.step + 1, mean.item(), all_sums, micro_batches)
                accelerator.backward(loss)
        return all_sums, mean

    def _count(self, micro_batches: list[MicroBatch]) -> tuple[list[int], int]:
        """Items of the step over all processes for each loss, and the most micro-batches of any. Exchanged between
        hosts, with the request to stop."""
        items = [sum(counts) for counts in zip(*(batch.items for batch in micro_batches), strict=True)]
        mine = torch.tensor([*items, len(micro_batches), self.stop_request.number])
        if self.accelerator.num_processes == 1:
            return items, len(micro_batches)
        counts = torch.empty(self.accelerator.num_processes, len(mine), dtype=mine.dtype)
        distributed.all_gather(list(counts.unbind()), mine, group=self.hosts)
        self.agreed_stop = int(counts[:, -1].max())
        return counts[:, :-2].sum(0).tolist(), int(counts[:, -2].max())

    @contextmanager
    def _translate_memory_errors(self, batch: MicroBatch | None) -> Iterator[None]:
        """batch: what is computed; None for the optimizer's update."""
        try:
            yield
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            where = f"at a micro-batch of {self.task.describe_batch(batch)}" if batch else "in the optimizer's update"
            values, advice = self.provenance.configuration, self.task.memory_advice
            raise memory_failure(error, self.state.step + 1, where, values, advice) from error

    def _clip_gradients(self) -> torch.Tensor | None:
        """Clip to max_grad_norm and return the norm before, a scalar; None where the engine does not tell."""
        limit = self.config.max_grad_norm
        norm = self.accelerator.clip_grad_norm_(self.model.parameters(), math.inf if limit is None else limit)
        if norm is None:
            return None
        norm = norm.full_tensor() if isinstance(norm, DTensor) else torch.as_tensor(norm)
        if not self.checks.skips_on_device:
            self.checks.check_norm(self.state.step + 1, norm.item())
        return norm

    # --- what happens between steps ---

    def _count_steps(self, latest: StepOutcome | None = None) -> None:
        """Enter into the log window what is known to be sound; the latest step not before the next one."""
        for outcome, loss, norm in self.checks.passed(latest):
            size = sum(batch.size for batch in outcome.micro_batches)
            self.window.add(loss, norm, size, outcome.lr, outcome.micro_batches[0].part)

    def _log_if_due(self) -> None:
        step = self.state.step
        if step % self.config.log_interval == 0 or step == self.total_steps:
            self._log()

    def _log(self) -> None:
        """Report the steps since the last report, if there are any. Evaluations and checkpoints do so first:
        a run resumed from a checkpoint then reports the same as one that was never stopped."""
        self._count_steps()
        if not self.window.steps:
            return
        step = self.state.step
        further = self.task.report(step, self.total_steps)
        epoch = round(step / float(self.dataset.steps_per_epoch), 4)
        self.tracking.train(step, {"epoch": epoch, **self.window.values(), **further})
        self.window = LogWindow(self.accelerator.num_processes, self.task.unit)

    def _at_epoch_end(self) -> bool:
        step, length = self.state.step, self.dataset.steps_per_epoch  # a fraction where epochs end within steps
        return step // length > (step - 1) // length

    def _evaluate_if_due(self) -> None:
        every, step = self.config.eval_steps, self.state.step
        if not self.metric or step == self.state.evaluated_step:
            return
        due = self._at_epoch_end() if every is None else step % every == 0
        if due or step == self.total_steps:
            self.evaluate()

    def evaluate(self) -> None:
        """Evaluate, report, and note (with a checkpoint) whether this is the best so far."""
        self._log()
        started = time.monotonic()
        self.model.eval()
        with torch.no_grad():
            values = self.task.evaluate(self.model, self.state.step)
        self.model.train()
        self.window.pause(time.monotonic() - started)
        self.state.evaluated_step = self.state.step
        metric = self.metric
        improved = self.state.step > 0 and self._note_best(values[metric])
        self.tracking.evaluation(self.state.step, values, f"  (best {metric} so far)" if improved else "")
        if improved:
            self.save_checkpoint()

    def _note_best(self, value: float) -> bool:
        best = self.state.best_metric
        lower_is_better = self.metric == "loss"
        improved = best is None or (value < best if lower_is_better else value > best)
        if improved:
            self.state.best_metric, self.state.best_step = value, self.state.step
            self.state.stale_evaluations = 0
        else:
            self.state.stale_evaluations += 1
        return improved

    def _has_stopped_improving(self) -> bool:
        patience, state = self.config.early_stopping_patience, self.state
        if patience is None or state.stale_evaluations < patience:
            return False
        self.tracking.say(
            f"early stop: {self.metric} has not improved on step {state.best_step} in "
            f"{state.stale_evaluations} evaluations"
        )
        return True

    # --- saving and loading ---

    def _save_if_due(self) -> None:
        every = self.config.save_steps
        due = every is not None and self.state.step % every == 0
        due = due or (self.config.save_on_epoch_end and self._at_epoch_end())
        if due and self.saved_step != self.state.step:
            self.save_checkpoint()

    def save_checkpoint(self) -> None:
        """See `Saver.save`. The log goes first, and the time is not taken for training."""
        self._log()
        started = time.monotonic()
        self.tracking.say(f"checkpoint: {self.saver.save(self.state, again=self.saved_step == self.state.step)}")
        self.saved_step = self.state.step
        self.window.pause(time.monotonic() - started)

    def _finish(self) -> None:
        """Write the final model: the best checkpoint's weights where a metric chose one, else the last."""
        self._log()
        state, temporary = self.state, self.checkpoints.temporary(self.state.step)
        with translate_storage_errors(self.output_dir):
            if self.accelerator.is_main_process:
                self.checkpoints.begin(state.step)
            if state.best_step is None:
                saved = temporary / "model"
                self.saver.save_model(saved, state.step)
            else:
                metric = self.metric
                self.tracking.say(f"final model: step {state.best_step}, the best {metric}")
                saved = self.checkpoints.path(state.best_step) / "model"
            if self.accelerator.is_main_process:
                (temporary / "results").mkdir()
                self.task.export(saved, temporary / "results")
                publish(temporary / "results", self.output_dir)
                self.checkpoints.discard(state.step)
                model_step = state.step if state.best_step is None else state.best_step
                finish(self.output_dir, state.run_id, model_step)
        self.accelerator.wait_for_everyone()
