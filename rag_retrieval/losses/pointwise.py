"""Losses of single pairs: binary cross entropy, and squared error of the probability."""

import torch
import torch.nn.functional as F
from torch import Tensor

from rag_retrieval.losses.groups import fill_padding


def pointwise_bce(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Binary cross entropy: - y log(sigmoid(s)) - (1 - y) log(1 - sigmoid(s)), from the logit s.

    scores: any shape, usually [pairs], any float dtype; the loss is computed in float32.
    labels: same shape, in [0, 1], hard or soft.
    mask: same shape, bool; padding where False. None: nothing is padding.

    Returns the sum over the pairs that are not padding and their number: a float32 scalar, 0 (with a graph) where
    every pair is padding, and an integer scalar. Raises ValueError when the shapes differ.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    losses = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    return losses.masked_fill(~mask, 0.0).sum(), mask.sum()


def pointwise_mse(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Squared error of the probability: (sigmoid(s) - y)^2.

    Shapes, dtype, mask, results and errors as in `pointwise_bce`. The gradient vanishes where the sigmoid saturates, so
    a score that is far out on the wrong side barely moves.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    losses = (scores.sigmoid() - labels).square()
    return losses.masked_fill(~mask, 0.0).sum(), mask.sum()


def bce_of_best_constant(labels: Tensor, mask: Tensor | None = None) -> float:
    """Mean BCE of the best constant score: the binary entropy, in nats, of the mean label of the batch.

    BCE is linear in the label, so only the mean label matters. With soft labels this is not the entropy of each label,
    which is the lower bound of any model. 0.0 for an empty batch.
    """
    real = _unpadded_labels(labels, mask)
    if not real.numel():
        return 0.0
    mean = real.mean()
    return float(torch.special.entr(mean) + torch.special.entr(1.0 - mean))


def mse_of_best_constant(labels: Tensor, mask: Tensor | None = None) -> float:
    """Mean squared error of the best constant score: the variance of the labels around their mean.

    That score has the mean label as its probability. 0.0 for an empty batch.
    """
    real = _unpadded_labels(labels, mask)
    return float(real.var(correction=0)) if real.numel() else 0.0


def _unpadded_labels(labels: Tensor, mask: Tensor | None) -> Tensor:
    """The labels that are not padding: [pairs], float64."""
    real = labels.flatten() if mask is None else labels[mask]
    return real.double()
