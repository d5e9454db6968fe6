"""What the training loop is told: a task with its loss, its validation and its files, and a run's settings.

What a reader would get wrong: `loss_sums` are sums, never means; the loop divides by the counts of the step.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import nn

from rag_retrieval.train.steps import MicroBatch


class TrainingError(RuntimeError):
    """Training cannot go on; the weights of the last checkpoint are intact. Raised by all processes alike."""


class ProcessFailure(TrainingError):
    """The same, found by this process alone: the others know nothing of it."""


class Task(Protocol):
    """What the loop must be told of the thing it trains."""

    def loss_sums(self, model: nn.Module, micro_batch: MicroBatch) -> torch.Tensor:
        """The summed losses of one micro-batch: float32 [losses] with a graph, as many as its `items`."""

    def extent(self, micro_batch: MicroBatch) -> str:
        """How large a micro-batch is, in words: told where memory ends."""

    def report(self, step: int, total_steps: int) -> dict[str, float]:
        """Further values over the steps since the last report, for the log."""

    def evaluate(self, model: nn.Module) -> dict[str, float]:
        """Finite metrics on validation data, equal on all processes; in eval mode without gradients."""

    def save_model(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        """Write the weights so that `load_model` and `export` can read them (main process only)."""

    def load_model(self, folder: Path) -> None:
        """Bring the bare model to the weights that `save_model` wrote."""

    def export(self, folder: Path, output_dir: Path) -> None:
        """Make the finished model in output_dir of what `save_model` wrote (main process only)."""


@dataclass(frozen=True)
class LoopSettings:
    """Counts are optimizer steps unless they say otherwise; None switches a thing off.

    metric_for_best_model: a key of what `Task.evaluate` returns; None where nothing is evaluated.
    """

    epochs: int
    warmup_proportion: float
    stable_proportion: float
    max_grad_norm: float | None
    log_interval: int
    num_workers: int
    num_max_checkpoints: int
    save_steps: int | None = None
    save_on_epoch_end: bool = True
    eval_steps: int | None = None
    eval_on_start: bool = False
    metric_for_best_model: str | None = None
    early_stopping_patience: int | None = None
