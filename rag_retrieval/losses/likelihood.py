"""Losses from the likelihood of the ranking that the labels ask for: ListMLE and its position-aware form.

What a reader would get wrong: equal labels. The papers ask for one ranking; where labels tie, other libraries take
the order of the file (or of the sort), so that shuffling a group changes the loss. Here documents of one label draw
from the same pool, which is all documents that are not above them, and those of the lowest label draw nothing, since
any order among them is right. With labels that all differ this is the formula of the papers; with one positive, ListMLE
is the listwise cross entropy.
"""

import torch
from torch import Tensor

from rag_retrieval.losses.graded_groups import graded, ordered_pairs
from rag_retrieval.losses.padding import centred, fill_label_padding, fill_padding, reduce_sum


def listmle(scores: Tensor, labels: Tensor, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """ListMLE: sum over documents i of log( sum_{j: y_j <= y_i} exp(s_j) ) - s_i, without those of the lowest label.

    Xia et al., "Listwise Approach to Learning to Rank: Theory and Algorithm" (ICML 2008), the likelihood loss: the
    negative log of the Plackett-Luce probability of the right ranking. Ties as in Breslow, "Covariance Analysis of
    Censored Survival Data" (Biometrics 1974); the lowest level is left out as in the likelihood of a top-k ranking.

    scores: [groups, documents], any float dtype; the loss is computed in float32.
    labels: [groups, documents], on any scale; only their order matters.
    mask: [groups, documents], bool; padding where False. None: nothing is padding.
    reduction: "mean" over the groups with documents of different labels, or "sum".

    Returns a float32 scalar; 0 (with a graph) where no two documents of a group differ in label. Memory is
    groups * documents^2. Raises ValueError when the shapes differ or the reduction is unknown.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    return reduce_sum(_terms(scores, labels, mask).sum(), graded(labels, mask).sum(), reduction)


def position_listmle(scores: Tensor, labels: Tensor, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """Position-aware ListMLE: the terms of `listmle`, each weighted with a(r) = 2^(n - r) - 1, r the document's rank
    by label from 1 to n, divided by the sum of all n weights.

    Lan et al., "Position-Aware ListMLE: A Sequential Learning Process for Ranking" (UAI 2014), which gives these
    weights; the division is ours and keeps groups of different size comparable. Documents of one label share the mean
    of their weights. Everything else as in `listmle`.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    losses = _terms(scores, labels, mask) * _position_weights(labels, mask)
    return reduce_sum(losses.sum(), graded(labels, mask).sum(), reduction)


def chance_listmle(labels: Tensor, mask: Tensor | None = None) -> float:
    """Mean ListMLE loss of a constant score, every constant the same; 0.0 where no labels differ."""
    labels, mask = fill_label_padding(labels, mask)
    return _chance(_terms(torch.zeros_like(labels, dtype=torch.float64), labels, mask), labels, mask)


def chance_position_listmle(labels: Tensor, mask: Tensor | None = None) -> float:
    """Mean position-aware ListMLE loss of a constant score; otherwise as `chance_listmle`."""
    labels, mask = fill_label_padding(labels, mask)
    terms = _terms(torch.zeros_like(labels, dtype=torch.float64), labels, mask)
    return _chance(terms * _position_weights(labels, mask), labels, mask)


def _chance(terms: Tensor, labels: Tensor, mask: Tensor) -> float:
    return float(terms.sum()) / max(int(graded(labels, mask).sum()), 1)


def _terms(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """log( sum_{j: y_j <= y_i} exp(s_j) ) - s_i at [group, i]; 0 at the lowest labels and at padding."""
    scores = centred(scores, mask)
    outranks = ordered_pairs(labels, mask)  # [group, lower, higher]
    above_lowest = outranks.any(dim=1)
    # at [group, i, j]: j is not above i; a row of padding may compete with anything, its term is dropped
    competes = (~outranks & mask.unsqueeze(1)) | ~mask.unsqueeze(2)
    pools = scores.unsqueeze(1).expand(competes.shape).masked_fill(~competes, torch.finfo(scores.dtype).min)
    return (pools.logsumexp(dim=2) - scores).masked_fill(~above_lowest, 0.0)


def _position_weights(labels: Tensor, mask: Tensor) -> Tensor:
    """a(r) / sum_r a(r), averaged over the ranks of each label, at [group, document]; 0 where labels do not differ.

    Both are divided by 2^n: 2^n itself is beyond float32 for groups of 128.
    """
    above = ordered_pairs(labels, mask).sum(dim=2, keepdim=False)  # documents with a higher label
    equal = ((labels.unsqueeze(2) == labels.unsqueeze(1)) & mask.unsqueeze(1)).sum(dim=2).clamp(min=1)
    size = mask.sum(dim=1, keepdim=True)
    of_level = (2.0**-above - 2.0 ** -(above + equal)) / equal  # mean of 2^-r over its ranks above + 1 to above + equal
    total = 1.0 - (size + 1) * 2.0**-size
    return ((of_level - 2.0**-size) / total).masked_fill(~(mask & graded(labels, mask).unsqueeze(1)), 0.0)
