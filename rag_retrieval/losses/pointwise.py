"""Losses that judge each pair by itself: binary cross entropy, and squared error of the probability.

What a reader would get wrong: `reduction="mean"` divides by the pairs of *this call*. A training step that
spans micro-batches or processes takes "sum" and divides by `count_pairs` over the whole step; averaging the
means of unequal micro-batches gives another number.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rag_retrieval.losses.padding import fill_padding, reduce_sum


def pointwise_bce(
    scores: Tensor, labels: Tensor, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Binary cross entropy: - y log(sigmoid(s)) - (1 - y) log(1 - sigmoid(s)), from the logit s.

    scores: any shape, usually [pairs], any float dtype; the loss is computed in float32.
    labels: same shape, in [0, 1], hard or soft.
    mask: same shape, bool; padding where False. None: nothing is padding.
    reduction: "mean" over the pairs that are not padding, or "sum".

    Returns a float32 scalar, 0 (with a graph) where every pair is padding.
    Raises ValueError when the shapes differ or the reduction is unknown.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    losses = F.binary_cross_entropy_with_logits(scores, labels, reduction="none")
    return reduce_sum(losses.masked_fill(~mask, 0.0).sum(), mask.sum(), reduction)


def pointwise_mse(
    scores: Tensor, labels: Tensor, mask: Tensor | None = None, reduction: str = "mean"
) -> Tensor:
    """Squared error of the probability: (sigmoid(s) - y)^2.

    Shapes, dtype, mask, reduction, empty input and errors as in `pointwise_bce`. The gradient vanishes where
    the sigmoid saturates, so a score that is far out on the wrong side barely moves.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    losses = (scores.sigmoid() - labels).square()
    return reduce_sum(losses.masked_fill(~mask, 0.0).sum(), mask.sum(), reduction)


def count_pairs(labels: Tensor, mask: Tensor | None = None) -> int:
    """Number of pairs that are not padding: what the mean of both pointwise losses divides by.

    Call it on CPU tensors: on a GPU it waits for the device.
    """
    return labels.numel() if mask is None else int(mask.sum())


def chance_bce(labels: Tensor, mask: Tensor | None = None) -> float:
    """Mean BCE of the best constant score: the binary entropy, in nats, of the mean label of the batch.

    BCE is linear in the label, so only the mean label matters. With soft labels this is the loss of a model
    that learned nothing, not the entropy of each label, which is the lower bound of any model. 0.0 for an
    empty batch.
    """
    real = _unpadded_labels(labels, mask)
    if not real.numel():
        return 0.0
    mean = real.mean()
    return float(torch.special.entr(mean) + torch.special.entr(1.0 - mean))


def chance_mse(labels: Tensor, mask: Tensor | None = None) -> float:
    """Mean squared error of the best constant score: the variance of the labels around their mean.

    That score has the mean label as its probability. 0.0 for an empty batch.
    """
    real = _unpadded_labels(labels, mask)
    return float(real.var(correction=0)) if real.numel() else 0.0


def _unpadded_labels(labels: Tensor, mask: Tensor | None) -> Tensor:
    """The labels that are not padding: [pairs], float64."""
    real = labels.flatten() if mask is None else labels[mask]
    return real.double()
