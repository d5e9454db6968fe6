"""What a run minimises: a loss on labels, a loss on a teacher's scores, or both, weighted; and whether it learns.

Each loss has a divisor of its own (pairs, groups, ordered pairs), so that a mix cannot be one sum with one count.
`sums` and `counts` have an entry for each loss, and the mean of a step is sum_l sums[l] / counts[l], with both taken
over all its micro-batches and processes.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from rag_retrieval.losses import LOSSES, Loss
from rag_retrieval.losses.custom import loss_named
from rag_retrieval.train.reranker.config import RerankerConfig

logger = logging.getLogger(__name__)

FLAT_SPREAD = 0.1  # standard deviation of scores that "hardly vary"; those of a trained model span units
NEAR_CONSTANT = 0.97  # of the loss of the best constant score: above it a model has learned next to nothing
MIN_FLAT_REPORTS = 3
FLAT_SHARE = 0.2  # of the run's steps: twice the default warmup, in which nothing can be expected
MAX_FLAT_STEPS = 1000  # optimizer steps; in a long run nobody should wait for a fifth of it
REMEDIES = (
    "the loss%s has stayed at the level of a constant score (%.3f, constant %.3f) for %d steps, and scores hardly vary "
    "(standard deviation %.3f): the model gives every pair nearly the same score. Try, in this order: a larger head_lr "
    "(1e-3), a larger lr, more steps; then look whether labels are right (label histogram above), whether positives "
    "and negatives really differ, and whether max_len cuts the decisive text away"
)


@dataclass(frozen=True)
class WeightedLoss:
    """weight: factor, at least 0. from_teacher: whether it learns from teacher scores rather than from labels.
    from_deepest: whether it learns from the scores of the model's deepest head, in place of either."""

    loss: Loss
    weight: float
    from_teacher: bool
    from_deepest: bool = False

    def targets(self, labels: Tensor, teacher_scores: Tensor | None) -> Tensor:
        if self.from_deepest:
            return torch.zeros_like(labels)  # what it learns from is not known before the forward, and changes no count
        return teacher_scores if self.from_teacher else labels


@dataclass(frozen=True)
class Objective:
    """losses: one, or two of the same dataset_type of which the second learns from a teacher; for a model with heads at
    several layers, last, the one that learns from the deepest head.

    Tensors are laid out as the losses want them: [pairs] or [groups, documents]. teacher_scores may be None where no
    loss reads them.
    """

    losses: tuple[WeightedLoss, ...]

    @classmethod
    def of(cls, loss: Loss) -> "Objective":
        """A single loss with weight 1."""
        return cls((WeightedLoss(loss, 1.0, loss.reads == "teacher_score"),))

    @property
    def grouped(self) -> bool:
        return self.losses[0].loss.dataset_type == "grouped"

    @property
    def layered(self) -> bool:
        """Whether the model has heads at several layers."""
        return self.losses[-1].from_deepest

    @property
    def one_positive(self) -> bool:
        return self.losses[0].loss.one_positive

    @property
    def reads_positives(self) -> bool:
        """Whether labels are 1 for positives and 0 for the rest, whatever the record's labels say."""
        return self.losses[0].loss.reads == "positive"

    @property
    def needs_teacher(self) -> bool:
        return any(weighted.from_teacher for weighted in self.losses)

    @property
    def teacher_range(self) -> tuple[float, float] | None:
        """What teacher scores must be within, both ends included; None: any number, or none are read."""
        ranges = (weighted.loss.label_range for weighted in self.losses if weighted.from_teacher)
        return next(ranges, None)

    def sums(self, scores: Tensor, labels: Tensor, teacher_scores: Tensor | None, mask: Tensor) -> Tensor:
        """The summed losses times their weights: float32 [losses], with a graph."""
        return torch.stack([
            weighted.weight * weighted.loss(scores, weighted.targets(labels, teacher_scores), mask)[0]
            for weighted in self.losses if not weighted.from_deepest
        ])  # fmt: skip

    def layered_sums(
        self, heads: Sequence[Tensor], labels: Tensor, teacher_scores: Tensor | None, mask: Tensor
    ) -> Tensor:
        """The same for the scores of several heads, the deepest last: each loss is the mean over the heads, and that of
        the distillation the mean over the heads before the deepest, which learns nothing from it."""
        sums = torch.stack([self.sums(scores, labels, teacher_scores, mask) for scores in heads]).mean(0)
        *shallow, deepest = heads
        distillation = self.losses[-1]
        targets = deepest.detach() if self.grouped else deepest.detach().sigmoid()
        learned = torch.stack([distillation.loss(scores, targets, mask)[0] for scores in shallow]).mean()
        return torch.cat([sums, (distillation.weight * learned)[None]])

    def counts(self, labels: Tensor, teacher_scores: Tensor | None, mask: Tensor) -> tuple[int, ...]:
        """What each sum is to be divided by, for tensors on the CPU."""
        return tuple(weighted.loss.count(weighted.targets(labels, teacher_scores), mask) for weighted in self.losses)

    def constant_score_loss(self, labels: Tensor, teacher_scores: Tensor | None, mask: Tensor) -> float:
        """The mean of the best constant score, for tensors on the CPU. A mix has the sum of what each loss has, which
        is right where every constant gives a loss the same, and a lower bound for pointwise ones."""
        return sum(
            weighted.weight * weighted.loss.constant_score_loss(weighted.targets(labels, teacher_scores), mask)
            for weighted in self.losses if not weighted.from_deepest
        )


def configured_objective(config: RerankerConfig) -> Objective:
    """The losses of a run: `loss_type`, and `teacher_loss_type` where it is given. ValueError as of `loss_named`."""
    loss = loss_named(config.loss_type, config.train_dataset_type)
    loss = replace(loss, option_values={option.name: getattr(config, option.name) for option in loss.options})
    own = Objective.of(loss) if config.teacher_loss_type is None else _with_teacher(config, loss)
    if config.start_layer is None:
        return own
    distillation = LOSSES["kl_distillation" if own.grouped else "point_ce"]
    return Objective((*own.losses, WeightedLoss(distillation, config.layer_distillation, False, from_deepest=True)))


def _with_teacher(config: RerankerConfig, loss: Loss) -> Objective:
    teacher = LOSSES[config.teacher_loss_type]
    options = {option.name: getattr(config, f"teacher_{option.name}") for option in teacher.options}
    return Objective((
        WeightedLoss(loss, 1.0 - config.teacher_weight, loss.reads == "teacher_score"),
        WeightedLoss(replace(teacher, option_values=options), config.teacher_weight, True),
    ))  # fmt: skip


class LabelledBatch(Protocol):
    """Labels as the losses take them, and how much is in them: a count for each loss, and pairs."""

    labels: Tensor
    teacher_scores: Tensor | None
    mask: Tensor
    items: tuple[int, ...]
    size: int


class ConstantScoreWatch:
    """Warns once of the commonest failure of reranker training: a model that gives every pair the same score.

    It compares the loss with that of the best constant score, and looks how much scores vary. For the log it has
    `chance_loss` and `score_std`: the standard deviation of scores, within groups for grouped losses, within
    micro-batches for pointwise ones. Sums stay on the device until a report; each process watches its own share of the
    data, and the log shows that of the first. Of several data sets each is watched by itself: part is the name of this
    one, which its values then have after theirs.
    """

    def __init__(self, objective: Objective, part: str = ""):
        self.objective, self.part = objective, part
        self.flat_reports = 0
        self.flat_since = 0  # step of the last report that was not flat
        self.warned = False
        self._clear()

    def _clear(self) -> None:
        self.losses: list[Tensor] = []
        self.targets: list[list[Tensor | None]] = []
        self.squares: list[Tensor] = []
        self.items = [0] * len(self.objective.losses)
        self.pairs = 0

    def add(self, sums: Tensor, scores: Tensor, batch: LabelledBatch) -> None:
        """One micro-batch: its summed losses, [losses], and scores in the layout of its labels. Fillers count
        nothing."""
        self.losses.append(sums)
        self.targets.append([batch.labels, batch.teacher_scores, batch.mask])
        self.squares.append(squared_deviations(scores, batch.mask))
        self.items = [total + count for total, count in zip(self.items, batch.items, strict=True)]
        self.pairs += batch.size

    def report(self, step: int, total_steps: int) -> dict[str, float]:
        """Values over what was added since the last report; {} where no loss had anything to count."""
        if not any(self.items):
            self._clear()
            return {}
        sums = torch.stack(self.losses).sum(0).tolist()
        loss = sum(total / max(count, 1) for total, count in zip(sums, self.items, strict=True))
        spread = (torch.stack(self.squares).sum().item() / self.pairs) ** 0.5
        constant = self.objective.constant_score_loss(*map(stack_rows, zip(*self.targets, strict=True)))
        self._clear()
        self._judge(loss, constant, spread, step, total_steps)
        values = {"chance_loss": constant, "score_std": spread}
        return {f"{name}/{self.part}": value for name, value in values.items()} if self.part else values

    def _judge(self, loss: float, constant: float, spread: float, step: int, total_steps: int) -> None:
        if constant > 0 and loss > NEAR_CONSTANT * constant and spread < FLAT_SPREAD:
            self.flat_reports += 1
        else:
            self.flat_reports, self.flat_since = 0, step
        flat_steps = step - self.flat_since
        long = flat_steps >= min(FLAT_SHARE * total_steps, MAX_FLAT_STEPS) and self.flat_reports >= MIN_FLAT_REPORTS
        if long and not self.warned:
            self.warned = True
            logger.warning(REMEDIES, f" of {self.part}" if self.part else "", loss, constant, flat_steps, spread)


def squared_deviations(scores: Tensor, mask: Tensor) -> Tensor:
    """Summed squared deviations from the mean of the last dimension, where mask is True; a scalar."""
    counts = mask.sum(-1, keepdim=True).clamp(min=1)
    means = (scores * mask).sum(-1, keepdim=True) / counts
    return ((scores - means) * mask).square().sum()


def stack_rows(parts: Sequence[Tensor | None]) -> Tensor | None:
    """Labels, teacher scores or masks of several micro-batches as one, on the CPU: groups are padded to the widest.
    None where there are none."""
    if parts[0] is None:
        return None
    rows = [tensor.cpu() for tensor in parts]
    if rows[0].dim() == 2:
        widest = max(tensor.shape[1] for tensor in rows)
        rows = [nn.functional.pad(tensor, (0, widest - tensor.shape[1])) for tensor in rows]
    return torch.cat(rows)
