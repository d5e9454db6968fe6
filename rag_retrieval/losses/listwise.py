"""Losses that look at a whole group at once: cross entropy of the one positive against its group.

What a reader would get wrong: a positive is a label of exactly 1, one per group, which reading the data has
to guarantee. A group without one (all negatives, or a filler row that is padding throughout) contributes 0
and is not counted in the mean; of a group with two, both terms are added although it counts once.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rag_retrieval.losses.padding import fill_label_padding, fill_padding, reduce_sum


def listwise_ce(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
) -> Tensor:
    """Listwise cross entropy: - log( exp(s_+ / T) / sum_j exp(s_j / T) ), s_+ the score of the positive.

    The ListNet loss with all of the target on one document, a cross entropy of top-one probabilities: Cao et
    al., "Learning to Rank: From Pairwise Approach to Listwise Approach" (ICML 2007).

    scores: [groups, documents], any float dtype; the loss is computed in float32.
    labels: [groups, documents], one 1 per group and 0 elsewhere.
    mask: [groups, documents], bool; padding where False. None: nothing is padding.
    reduction: "mean" over the groups that have a positive, or "sum".
    temperature: T > 0; below 1 it sharpens the distribution.

    Returns a float32 scalar; 0 (with a graph) where no group has a positive, and a group of one document
    gives 0. Raises ValueError when the shapes differ, the reduction is unknown or the temperature is not
    positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive; 1.0 leaves the scores as they are.")
    scores, labels, mask = fill_padding(scores, labels, mask)
    # Not -inf: a row that is padding throughout would pass through nan, which autograd's anomaly detection,
    # switched on to hunt another nan, would report.
    logits = (scores / temperature).masked_fill(~mask, torch.finfo(torch.float32).min)
    positive = _positives(labels)
    losses = -F.log_softmax(logits, dim=1).masked_fill(~positive, 0.0)
    return reduce_sum(losses.sum(), positive.any(dim=1).sum(), reduction)


def count_groups(labels: Tensor, mask: Tensor | None = None) -> int:
    """Number of groups that have a positive: what the mean of `listwise_ce` divides by.

    labels, mask: [groups, documents]. Call it on CPU tensors: on a GPU it waits for the device.
    """
    labels, _ = fill_label_padding(labels, mask)
    return int(_positives(labels).any(dim=1).sum())


def chance_listwise_ce(labels: Tensor, mask: Tensor | None = None) -> float:
    """Mean listwise loss of a constant score: the mean log(number of documents) over groups with a positive.

    Every constant and every temperature give the same. 0.0 where no group has a positive.
    """
    labels, mask = fill_label_padding(labels, mask)
    sizes = mask.sum(dim=1)[_positives(labels).any(dim=1)]
    return float(sizes.double().log().mean()) if sizes.numel() else 0.0


def _positives(labels: Tensor) -> Tensor:
    """True at the documents with label 1; padding is none, because its labels have been filled with 0."""
    return labels == 1.0
