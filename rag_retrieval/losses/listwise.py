"""Losses from a softmax over a group: cross entropy of the one positive, ListNet, and InfoNCE.

What a reader would get wrong: the three differ in what they take for a positive. For `listwise_ce` it is a label
of exactly 1, one per group, which reading the data has to guarantee: a group without one contributes 0 and is not
counted; of a group with two, both terms are added although it counts once. For `info_nce` it is every document
above the lowest label of its group, and its other positives do not compete with it. `listnet` knows none: all labels
together are the target.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rag_retrieval.losses.graded_groups import graded, ordered_pairs
from rag_retrieval.losses.padding import centred, fill_label_padding, fill_padding, reduce_sum


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
    scores, labels, mask = fill_padding(scores, labels, mask)
    logits = softmax_logits(scores, mask, temperature)
    positive = _positives(labels)
    losses = -F.log_softmax(logits, dim=1).masked_fill(~positive, 0.0)
    return reduce_sum(losses.sum(), positive.any(dim=1).sum(), reduction)


def listnet(scores: Tensor, labels: Tensor, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """ListNet: - sum_j P_j(y) log P_j(s), with P_j(v) = exp(v_j) / sum_k exp(v_k), of labels y and scores s.

    Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach" (ICML 2007): the cross entropy
    of the top-one probabilities, with exp for their increasing function phi.

    scores: [groups, documents], any float dtype; the loss is computed in float32.
    labels: [groups, documents], on any scale; the scale says how sharp the target is. Labels 1, 0, 0, 0 make a
        flat one (0.48 and 0.17 thrice), and the least loss is its entropy, not 0.
    mask: [groups, documents], bool; padding where False. None: nothing is padding.
    reduction: "mean" over the groups with documents of different labels, or "sum".

    Returns a float32 scalar; 0 (with a graph) where no two documents of a group differ in label: such a group is
    skipped, though the formula would ask it for equal scores. Raises ValueError when the shapes differ or the
    reduction is unknown.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    target = softmax_logits(labels, mask).softmax(dim=1)
    losses = -target * F.log_softmax(softmax_logits(scores, mask), dim=1)
    of_graded = graded(labels, mask)
    losses = losses.masked_fill(~(mask & of_graded.unsqueeze(1)), 0.0)
    return reduce_sum(losses.sum(), of_graded.sum(), reduction)


def info_nce(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
) -> Tensor:
    """InfoNCE: for each positive p, - log( exp(s_p / T) / (exp(s_p / T) + sum_n exp(s_n / T)) ), n the negatives
    of its group.

    Van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (2018), equation 4, with the
    documents of the group as the candidates. With one positive it is `listwise_ce`.

    scores, mask, temperature, errors: as in `listwise_ce`.
    labels: [groups, documents], on any scale; positives are above the lowest label of their group.
    reduction: "mean" over the positives, or "sum".

    Returns a float32 scalar; 0 (with a graph) where no two documents of a group differ in label.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    scores, positive = centred(scores, mask), _above_lowest(labels, mask)
    logits = softmax_logits(scores, mask & ~positive, temperature)
    # log(1 + exp(negatives - positive)), which neither overflows nor loses a small loss to rounding
    losses = F.softplus(logits.logsumexp(dim=1, keepdim=True) - scores / temperature)
    return reduce_sum(losses.masked_fill(~positive, 0.0).sum(), positive.sum(), reduction)


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


def chance_listnet(labels: Tensor, mask: Tensor | None = None) -> float:
    """Mean ListNet loss of a constant score: the mean log(number of documents) over groups with different labels.

    Every constant gives the same. 0.0 where there is no such group.
    """
    labels, mask = fill_label_padding(labels, mask)
    sizes = mask.sum(dim=1)[graded(labels, mask)]
    return float(sizes.double().log().mean()) if sizes.numel() else 0.0


def count_positives(labels: Tensor, mask: Tensor | None = None) -> int:
    """Number of documents above the lowest label of their group: what the mean of `info_nce` divides by.

    labels, mask: [groups, documents]. Call it on CPU tensors: on a GPU it waits for the device.
    """
    return int(_above_lowest(*fill_label_padding(labels, mask)).sum())


def chance_info_nce(labels: Tensor, mask: Tensor | None = None) -> float:
    """Mean InfoNCE loss of a constant score: the mean log(1 + number of its negatives) over positives.

    Every constant and every temperature give the same. 0.0 where there is no positive.
    """
    labels, mask = fill_label_padding(labels, mask)
    positive = _above_lowest(labels, mask)
    negatives = (mask & ~positive).sum(dim=1, keepdim=True).expand_as(positive)[positive]
    return float(negatives.double().log1p().mean()) if negatives.numel() else 0.0


def softmax_logits(values: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """values / temperature, and the lowest float32 where mask is False, which takes no share of a softmax.

    Not -inf: a row that is padding throughout would pass through nan, which autograd's anomaly detection, switched on
    to hunt another nan, would report. Raises ValueError when the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive; 1.0 leaves the scores as they are.")
    return (values / temperature).masked_fill(~mask, torch.finfo(torch.float32).min)


def _above_lowest(labels: Tensor, mask: Tensor) -> Tensor:
    """True at the documents that have a lower label in their group."""
    return ordered_pairs(labels, mask).any(dim=1)


def _positives(labels: Tensor) -> Tensor:
    """True at the documents with label 1; padding is none, because its labels have been filled with 0."""
    return labels == 1.0
