"""A watch for the commonest failure of reranker training: a model that gives every pair the same score.

What a reader would get wrong: each process watches its own share of the data, and the log shows that of
the first one.
"""

import logging

import torch
from torch import nn

from rag_retrieval.losses import Loss
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
    "the loss has stayed at the level of a constant score (%.3f, chance %.3f) for %d steps, and scores "
    "hardly vary (standard deviation %.3f): the model gives every pair nearly the same score. Try, in this "
    "order: a larger head_lr (1e-3), a larger lr, more steps; then look whether labels are right (label "
    "histogram above), whether positives and negatives really differ, and whether max_len cuts the decisive "
    "text away"
)


class ChanceWatch:
    """Compares the loss with that of the best constant score, and looks how much scores vary.

    It adds to the log `chance_loss` and `score_std`: the standard deviation of scores, within groups for
    grouped losses, within micro-batches for pointwise ones. It warns once. Sums stay on the device until a
    report.
    """

    def __init__(self, loss: Loss):
        self.loss = loss
        self.flat_reports = 0
        self.flat_since = 0  # step of the last report that was not flat
        self.warned = False
        self._clear()

    def _clear(self) -> None:
        self.losses: list[torch.Tensor] = []
        self.labels: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.squares: list[torch.Tensor] = []
        self.items = self.pairs = 0

    def add(self, loss: torch.Tensor, scores: torch.Tensor, batch: RerankerMicroBatch) -> None:
        """One micro-batch: its summed loss, and scores in the layout of its labels. Fillers count nothing."""
        self.losses.append(loss)
        self.labels.append((batch.labels, batch.mask))
        self.squares.append(squared_deviations(scores, batch.mask))
        self.items += batch.items
        self.pairs += batch.size

    def report(self, step: int, total_steps: int) -> dict[str, float]:
        """Values over what was added since the last report; {} where the loss had nothing to count."""
        if not self.items:
            self._clear()
            return {}
        loss = torch.stack(self.losses).sum().item() / self.items
        spread = (torch.stack(self.squares).sum().item() / self.pairs) ** 0.5
        chance = self.loss.chance(*stack_rows(self.labels))
        self._clear()
        self._judge(loss, chance, spread, step, total_steps)
        return {"chance_loss": chance, "score_std": spread}

    def _judge(self, loss: float, chance: float, spread: float, step: int, total_steps: int) -> None:
        if chance > 0 and loss > NEAR_CHANCE * chance and spread < FLAT_SPREAD:
            self.flat_reports += 1
        else:
            self.flat_reports, self.flat_since = 0, step
        flat_steps = step - self.flat_since
        long = flat_steps >= min(PATIENCE * total_steps, MOST_STEPS) and self.flat_reports >= LEAST_REPORTS
        if long and not self.warned:
            self.warned = True
            logger.warning(REMEDIES, loss, chance, flat_steps, spread)


def squared_deviations(scores: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Summed squared deviations from the mean of the last dimension, where mask is True; a scalar."""
    counts = mask.sum(-1, keepdim=True).clamp(min=1)
    means = (scores * mask).sum(-1, keepdim=True) / counts
    return ((scores - means) * mask).square().sum()


def stack_rows(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels and masks of several micro-batches as one, on the CPU: groups are padded to the widest."""
    labels, masks = ([tensor.cpu() for tensor in tensors] for tensors in zip(*parts, strict=True))
    if labels[0].dim() == 2:
        widest = max(rows.shape[1] for rows in labels)
        labels, masks = (
            [nn.functional.pad(rows, (0, widest - rows.shape[1])) for rows in tensors]
            for tensors in (labels, masks)
        )
    return torch.cat(labels), torch.cat(masks)
