"""What a run minimises: one loss, or a loss on labels and a loss on a teacher's scores, weighted.

What a reader would get wrong: each loss has a divisor of its own (pairs, groups, ordered pairs), so that a mix cannot
be one sum with one count. `sums` and `counts` have an entry for each loss, and the mean of a step is
sum_l sums[l] / counts[l], with both taken over all its micro-batches and processes.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from rag_retrieval.losses import LOSSES, Loss
from rag_retrieval.losses.custom import loss_named
from rag_retrieval.train.reranker.config import RerankerConfig


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

    def chance(self, labels: Tensor, teacher_scores: Tensor | None, mask: Tensor) -> float:
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
