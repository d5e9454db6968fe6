"""Losses that compare two documents of one group: RankNet.

What a reader would get wrong: the mean divides by the ordered pairs of *documents* (those whose labels
differ), not by the groups or the documents. A group of 16 with one positive has 15 of them, and a group whose
labels are all equal has none: it teaches RankNet nothing and counts for nothing.
"""

import math

import torch.nn.functional as F
from torch import Tensor

from rag_retrieval.losses.graded_groups import differences, ordered_pairs
from rag_retrieval.losses.padding import fill_label_padding, fill_padding, reduce_sum


def ranknet(scores: Tensor, labels: Tensor, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """RankNet: sum over documents i, j of a group with r_i < r_j of |r_j - r_i| log(1 + exp(s_i - s_j)).

    Burges et al., "Learning to Rank using Gradient Descent" (ICML 2005), equation 3 with the target
    probability 1 that j ranks above i. The weight |r_j - r_i| is not in the paper: it makes a large
    difference of grade cost more than a small one.

    scores: [groups, documents], any float dtype; the loss is computed in float32.
    labels: [groups, documents], on any scale.
    mask: [groups, documents], bool; padding where False. None: nothing is padding.
    reduction: "mean" over all ordered pairs of all groups, or "sum".

    Returns a float32 scalar; 0 (with a graph) where no two documents of a group differ in label.
    Memory is groups * documents^2. Raises ValueError when the shapes differ or the reduction is unknown.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    ordered = ordered_pairs(labels, mask)
    losses = -differences(labels) * F.softplus(differences(scores))
    return reduce_sum(losses.masked_fill(~ordered, 0.0).sum(), ordered.sum(), reduction)


def count_ordered_pairs(labels: Tensor, mask: Tensor | None = None) -> int:
    """Number of document pairs of a group whose labels differ: what the mean of `ranknet` divides by.

    labels, mask: [groups, documents]. Labels are compared in float32, as in the loss. Call it on CPU tensors:
    on a GPU it waits for the device.
    """
    labels, mask = fill_label_padding(labels, mask)
    return int(ordered_pairs(labels, mask).sum())


def chance_ranknet(labels: Tensor, mask: Tensor | None = None) -> float:
    """Mean RankNet loss of a constant score: log 2 times the mean |r_j - r_i| over ordered pairs.

    Every constant gives the same. 0.0 where there is no ordered pair.
    """
    labels, mask = fill_label_padding(labels, mask)
    weights = -differences(labels)[ordered_pairs(labels, mask)].double()
    return math.log(2.0) * float(weights.mean()) if weights.numel() else 0.0
