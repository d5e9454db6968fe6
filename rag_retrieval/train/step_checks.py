"""Losses and gradients that are not finite stop the run before they get into the weights.

A step is checked when the next one is under way: reading its loss at once would stall the device in every step. The
weights are safe all the same, since the fused optimizer leaves them alone on the device. Engines whose optimizer cannot
do so are checked at once, which under DeepSpeed is too late for the gradient: its backward updates the weights.
"""

import math
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, gather_object

from rag_retrieval.train.steps import MicroBatch
from rag_retrieval.train.task import TrainingError

MOST_SKIPPED = 30  # fp16 steps in a row; halving the first scale of 65536 so often leaves nothing to overflow
WHOLE = (DistributedType.NO, DistributedType.MULTI_CPU, DistributedType.MULTI_GPU)  # each process has all weights


@dataclass(frozen=True)
class StepOutcome:
    """What a step gave, on the device: summed losses of its micro-batches, [losses] each, their mean over all items,
    and the norm of the gradient before clipping (None where the engine does not tell). step: counted from 1."""

    step: int
    micro_batches: list[MicroBatch]
    losses: list[torch.Tensor]
    mean: torch.Tensor
    norm: torch.Tensor | None
    lr: float


class StepChecks:
    """Raises TrainingError, on every process alike, for a step whose loss or gradient is not finite on any.

    skips_on_device: whether `guard` keeps the weights, so that a step may be looked at later.
    """

    def __init__(
        self, accelerator: Accelerator, optimizer: torch.optim.Optimizer, describe_batch: Callable[[MicroBatch], str]
    ):
        self.describe_batch = describe_batch
        self.updates_in_backward = accelerator.distributed_type == DistributedType.DEEPSPEED
        whole = accelerator.distributed_type in WHOLE and accelerator.scaler is None
        self.skips_on_device = bool(whole and optimizer.defaults.get("fused"))
        self.optimizer = optimizer
        self.most_skipped = MOST_SKIPPED if accelerator.mixed_precision == "fp16" else 0
        self.skipped_in_a_row = 0
        self.waiting: deque[StepOutcome] = deque()

    def guard(self, mean: torch.Tensor, norm: torch.Tensor) -> None:
        """Before the optimizer's step: make it change nothing unless both are finite."""
        if self.skips_on_device:
            self.optimizer.found_inf = (~torch.isfinite(mean + norm)).float()

    def passed(self, outcome: StepOutcome | None = None) -> Iterator[tuple[StepOutcome, float, float | None]]:
        """Outcomes that passed the checks, with their loss and norm: all but the given one, or all without one."""
        while self.waiting:
            earlier = self.waiting.popleft()
            loss, norm = earlier.mean.item(), None if earlier.norm is None else earlier.norm.item()
            if self.skips_on_device:
                self.check_loss(earlier.step, loss, earlier.losses, earlier.micro_batches)
                self.check_norm(earlier.step, norm)
            yield earlier, loss, norm
        if outcome is not None:
            self.waiting.append(outcome)

    def check_loss(self, step: int, mean: float, losses: list[torch.Tensor], micro_batches: list[MicroBatch]) -> None:
        if math.isfinite(mean):
            return
        # fillers beyond the micro-batches have a loss and no source
        finite = [math.isfinite(sums.sum().item()) for sums in losses]
        bad = [batch for batch, sound in zip(micro_batches, finite, strict=False) if not sound]
        sources = gather_object([source for batch in bad for source in batch.sources])
        where = ", ".join(sources[:20]) + (f" and {len(sources) - 20} more" if len(sources) > 20 else "")
        first = next(iter(gather_object([self.describe_batch(batch) for batch in bad[:1]])), "none")
        raise TrainingError(
            f"the loss of step {step} is {mean}; no weight was changed by it. Records of the micro-batches whose loss "
            f"is not finite: {where}. The first of these micro-batches: {first}. Look at these records and labels; in "
            "later steps also lower lr or max_grad_norm, lengthen the warmup, or train in mixed_precision bf16 or no "
            "instead of fp16"
        )

    def check_norm(self, step: int, norm: float) -> None:
        """A gradient that is not finite stops the run, but for fp16, whose scaler then skips the step and lowers
        its scale."""
        self.skipped_in_a_row = 0 if math.isfinite(norm) else self.skipped_in_a_row + 1
        if self.skipped_in_a_row > self.most_skipped:
            changed = (
                "the weights in memory were changed by it and are not saved; earlier checkpoints are intact"
                if self.updates_in_backward
                else "no weight was changed by it"
            )
            raise TrainingError(
                f"the gradient norm of step {step} is {norm} though the loss is finite; {changed}. Lower lr, or train "
                "in mixed_precision bf16 or no"
            )
