"""What the training loop needs of a trainer: a task with its losses, its validation and its files."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import torch
from torch import nn

from rag_retrieval.train.steps import MicroBatch


class TrainingError(RuntimeError):
    """Training cannot continue; the weights of the last checkpoint are intact. Raised by all processes alike."""


class ProcessFailure(TrainingError):
    """A TrainingError of this process alone, of which the others do not know."""


class StepLoss(NamedTuple):
    """loss: a scalar with a graph, to be back-propagated. sums: float32 [losses] without one, the summed losses that
    are logged and checked, as many as `MicroBatch.items`. Their sum over the step's micro-batches and processes is
    divided by the step's items; which micro-batch has which part of it is the task's choice."""

    loss: torch.Tensor
    sums: torch.Tensor


class Task(Protocol):
    """What is trained. unit: what `MicroBatch.size` counts, in the log. memory_advice: a sentence or two on what to do
    where memory ends, which names keys of the configuration."""

    unit: str
    memory_advice: str

    def losses(
        self, model: nn.Module, micro_batches: Sequence[MicroBatch], factors: Sequence[float], step: int
    ) -> Iterator[StepLoss]:
        """The losses of one optimizer step, one for each of this process's micro-batches, in their order. The loop
        back-propagates each before it asks for the next, so that one graph lives at a time.

        micro_batches: on the model's device; as many on every process, fillers among them. factors: for each loss
        processes / (its items over the whole step), which times a sum is its part of the step's mean: engines average
        gradients over processes. step: optimizer steps done before this one. A loss that couples the whole step first
        embeds all micro-batches, gathers, and then yields surrogates whose gradients are those of the step's loss.
        """

    def describe_batch(self, micro_batch: MicroBatch) -> str:
        """How large a micro-batch is and what is in it, for errors."""

    def report(self, step: int, total_steps: int) -> dict[str, float]:
        """Further values over the steps since the last report, for the log."""

    def evaluate(self, model: nn.Module, step: int) -> dict[str, float]:
        """Finite metrics on validation data, equal on all processes; in eval mode without gradients. step: optimizer
        steps done, 0 before the first."""

    def save_model(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        """Write the weights so that `load_model` and `export` can read them (main process only)."""

    def load_model(self, folder: Path) -> None:
        """Bring the bare model to the weights that `save_model` wrote."""

    def rehearse(self) -> None:
        """Before the first step, on the main process: raise ValueError where what was trained could not be exported."""

    def export(self, folder: Path, results: Path) -> None:
        """Write the finished folders of the run (`model`, and `adapter` where there is one) into the empty folder
        `results`, from what `save_model` wrote (main process only)."""


def weighted_sum(sums: torch.Tensor, factors: Sequence[float]) -> torch.Tensor:
    """sum_l sums[l] * factors[l], a scalar. sums: [losses]. Factors stay on the host: sending them to a device would
    cost a copy a step."""
    return sum(part * factor for part, factor in zip(sums.unbind(), factors, strict=True))
