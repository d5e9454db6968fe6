"""A watch for the commonest failure of reranker training: a model that gives every pair the same score.

What a reader would get wrong: each process watches its own share of the data, and the log shows that of
the first one.
"""

import logging
from collections.abc import Sequence

import torch
from torch import nn

from rag_retrieval.train.reranker.objective import Objective
from rag_retrieval.train.reranker.training_data import RerankerMicroBatch

logger = logging.getLogger(__name__)

FLAT_SPREAD = (
    0.1  # standard deviation of scores below which they "hardly vary"; those of a trained model span units
)
NEAR_CHANCE = 0.97  # of the chance level: a loss above that has learned next to nothing
LEAST_REPORTS = 3
PATIENCE = 0.2  # of the run's steps: twice the default warmup, in which nothing can be expected
MOST_STEPS = 1000  # optimizer steps; in a long run nobody should wait for a fifth of it

REMEDIES = (
    "the loss%s has stayed at the level of a constant score (%.3f, chance %.3f) for %d steps, and scores "
    "hardly vary (standard deviation %.3f): the model gives every pair nearly the same score. Try, in this "
    "order: a larger head_lr (1e-3), a larger lr, more steps; then look whether labels are right (label "
    "histogram above), whether positives and negatives really differ, and whether max_len cuts the decisive "
    "text away"
)


class ChanceWatch:
    """Compares the loss with that of the best constant score, and looks how much scores vary.

    It adds to the log `chance_loss` and `score_std`: the standard deviation of scores, within groups for
    grouped losses, within micro-batches for pointwise ones. It warns once. Sums stay on the device until a
    report. Of several data sets each is watched by itself: part is the name of this one, which its values then
    have after theirs.
    """

    def __init__(self, objective: Objective, part: str = ""):
        self.objective, self.part = objective, part
        self.flat_reports = 0
        self.flat_since = 0  # step of the last report that was not flat
        self.warned = False
        self._clear()

    def _clear(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.targets: list[list[torch.Tensor | None]] = []
        self.squares: list[torch.Tensor] = []
        self.items = [0] * len(self.objective.losses)
        self.pairs = 0

    def add(self, sums: torch.Tensor, scores: torch.Tensor, batch: RerankerMicroBatch) -> None:
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
        chance = self.objective.chance(*map(stack_rows, zip(*self.targets, strict=True)))
        self._clear()
        self._judge(loss, chance, spread, step, total_steps)
        values = {"chance_loss": chance, "score_std": spread}
        return {f"{name}/{self.part}": value for name, value in values.items()} if self.part else values

    def _judge(self, loss: float, chance: float, spread: float, step: int, total_steps: int) -> None:
        if chance > 0 and loss > NEAR_CHANCE * chance and spread < FLAT_SPREAD:
            self.flat_reports += 1
        else:
            self.flat_reports, self.flat_since = 0, step
        flat_steps = step - self.flat_since
        long = flat_steps >= min(PATIENCE * total_steps, MOST_STEPS) and self.flat_reports >= LEAST_REPORTS
        if long and not self.warned:
            self.warned = True
            logger.warning(REMEDIES, f" of {self.part}" if self.part else "", loss, chance, flat_steps, spread)


def squared_deviations(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Summed squared deviations from the mean of the last dimension, where mask is True; a scalar."""
    counts = mask.sum(-1, keepdim=True).clamp(min=1)
    means = (scores * mask).sum(-1, keepdim=True) / counts
    return ((scores - means) * mask).square().sum()


def stack_rows(parts: Sequence[torch.Tensor | None]) -> torch.Tensor | None:
    """Labels, teacher scores or masks of several micro-batches as one, on the CPU: groups are padded to the widest.
    None where there are none."""
    if parts[0] is None:
        return None
    rows = [tensor.cpu() for tensor in parts]
    if rows[0].dim() == 2:
        widest = max(tensor.shape[1] for tensor in rows)
        rows = [nn.functional.pad(tensor, (0, widest - tensor.shape[1])) for tensor in rows]
    return torch.cat(rows)
