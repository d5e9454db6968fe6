"""Losses of two documents of one group: RankNet, and LambdaLoss, which weights pairs with their effect on nDCG."""

import math
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from rag_retrieval.losses.groups import differences, fill_label_padding, fill_padding, graded, ordered_pairs

LambdaWeights = Literal["ndcg_loss2pp", "lambdarank"]
MU = 10.0  # of NDCG-Loss2 in NDCG-Loss2++, as in the paper's experiments


def ranknet(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """RankNet: sum over documents i, j of a group with r_i < r_j of |r_j - r_i| log(1 + exp(s_i - s_j)).

    Burges et al., "Learning to Rank using Gradient Descent" (ICML 2005), equation 3 with the target
    probability 1 that j ranks above i. The weight |r_j - r_i| is not in the paper: it makes a large
    difference of grade cost more than a small one.

    scores: [groups, documents], any float dtype; the loss is computed in float32.
    labels: [groups, documents], on any scale.
    mask: [groups, documents], bool; padding where False. None: nothing is padding.

    Returns the sum and the number of ordered pairs, which are the pairs of documents of one group whose labels differ
    in float32: a group of 16 with one positive has 15, a group of equal labels none. The sum is a float32 scalar, 0
    (with a graph) where there is none. Memory is groups * documents^2. Raises ValueError when the shapes differ.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    ordered = ordered_pairs(labels, mask)
    losses = -differences(labels) * F.softplus(differences(scores))
    return losses.masked_fill(~ordered, 0.0).sum(), ordered.sum()


def lambda_loss(
    scores: Tensor,
    labels: Tensor,
    mask: Tensor | None = None,
    lambda_weights: LambdaWeights = "ndcg_loss2pp",
    lambda_top_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """LambdaLoss: sum over documents i, j of a group with y_i > y_j of w_ij |G_i - G_j| log2(1 + exp(s_j - s_i)).

        G_i = (2^y_i - 1) / maxDCG, D(r) = log2(1 + r), r_i the rank of document i by score, from 1
        lambdarank:    w_ij = |1 / D(r_i) - 1 / D(r_j)|
        ndcg_loss2pp:  w_ij = |1 / D(r_i) - 1 / D(r_j)| + 10 |1 / D(d) - 1 / D(d + 1)|,  d = |r_i - r_j|

    Wang et al., "The LambdaLoss Framework for Ranking Metric Optimization" (CIKM 2018): the losses LambdaRank and
    NDCG-Loss2++ with sigma 1 and mu 10. No gradient passes through the ranks. Of equal scores the lower label ranks
    first, so that the order of a file earns nothing; a constant score therefore loses more than a random order.

    scores: [groups, documents], any float dtype; the loss is computed in float32.
    labels: [groups, documents], grades in [0, 31]: the gain is 2^label.
    mask: [groups, documents], bool; padding where False. None: nothing is padding.
    lambda_top_k: k >= 1 for nDCG@k: maxDCG of the k best labels, and only pairs of which one document at least is
        among the k best by score. None: all pairs.

    Returns the sum and the number of groups with documents of different labels: a float32 scalar, 0 (with a graph)
    where there is none, and an integer scalar. Memory is groups * documents^2. Raises ValueError when the shapes
    differ or the weights are unknown.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    ranks = _ranks(scores.detach(), labels, mask).float()
    weights = _rank_weights(ranks.unsqueeze(2), ranks.unsqueeze(1), lambda_weights, lambda_top_k)
    weights = weights * differences(_gains(labels, lambda_top_k)).abs()
    losses = weights * F.softplus(differences(scores)) / math.log(2.0)  # at [group, lower, higher]
    losses = losses.masked_fill(~ordered_pairs(labels, mask), 0.0)
    return losses.sum(), graded(labels, mask).sum()


def lambda_loss_of_random_order(
    labels: Tensor,
    mask: Tensor | None = None,
    lambda_weights: LambdaWeights = "ndcg_loss2pp",
    lambda_top_k: int | None = None,
) -> float:
    """Mean LambdaLoss of equal scores, over all orders in which equal scores may be ranked; 0.0 where no labels differ.

    In a random order every two documents have any two ranks, so that each pair has the mean weight of all of them.
    """
    labels, mask = fill_label_padding(labels, mask)
    gains = differences(_gains(labels.double(), lambda_top_k)).abs()
    gains = gains.masked_fill(~ordered_pairs(labels, mask), 0.0).sum(dim=(1, 2))
    sizes = mask.sum(dim=1)[gains > 0]
    means = {size: _mean_rank_weight(size, lambda_weights, lambda_top_k) for size in set(sizes.tolist())}
    total = sum(gain * means[size] for gain, size in zip(gains[gains > 0].tolist(), sizes.tolist(), strict=True))
    return total / max(int(graded(labels, mask).sum()), 1)


def _ranks(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
    """Ranks by score, from 1, at [group, document]; of equal scores the lower label first, padding last."""
    # never an infinity for the padding: a real score of -inf would then tie with it
    by_label = labels.masked_fill(~mask, torch.finfo(labels.dtype).max).argsort(dim=1, stable=True)
    lowest = torch.finfo(scores.dtype).min
    values = scores.masked_fill(~mask, lowest).gather(1, by_label)
    order = by_label.gather(1, values.argsort(dim=1, descending=True, stable=True))
    positions = torch.arange(1, scores.shape[1] + 1, device=scores.device).expand_as(order)
    return torch.zeros_like(order).scatter(1, order, positions)


def _rank_weights(first: Tensor, second: Tensor, lambda_weights: str, top_k: int | None) -> Tensor:
    """w_ij of two ranks, broadcast against each other; 0 where both are beyond top_k or both are the same."""
    weights = (1.0 / _discount(first) - 1.0 / _discount(second)).abs()
    if lambda_weights == "ndcg_loss2pp":
        apart = (first - second).abs().clamp(min=1.0)
        weights = weights + MU * (1.0 / _discount(apart) - 1.0 / _discount(apart + 1.0)).abs()
    elif lambda_weights != "lambdarank":
        raise ValueError(f"lambda_weights {lambda_weights!r} is unknown; use 'ndcg_loss2pp' or 'lambdarank'.")
    left_out = first == second
    if top_k is not None:
        left_out = left_out | (torch.minimum(first, second) > top_k)
    return weights.masked_fill(left_out, 0.0)


def _mean_rank_weight(size: int, lambda_weights: str, top_k: int | None) -> float:
    """Mean of w_ij over all pairs of different ranks of a group of `size` >= 2 documents."""
    ranks = torch.arange(1, size + 1, dtype=torch.float64)
    return float(_rank_weights(ranks[:, None], ranks[None, :], lambda_weights, top_k).sum()) / (size * (size - 1))


def _discount(rank: Tensor) -> Tensor:
    return torch.log2(1.0 + rank)


def _gains(labels: Tensor, top_k: int | None) -> Tensor:
    """(2^label - 1) / maxDCG at [group, document]; padding has the label 0, and so no gain."""
    gains = torch.exp2(labels) - 1.0
    best = gains.sort(dim=1, descending=True).values[:, :top_k]
    positions = torch.arange(1, best.shape[1] + 1, device=labels.device, dtype=labels.dtype)
    ideal = (best / _discount(positions)).sum(dim=1, keepdim=True)
    return gains / ideal.clamp(min=torch.finfo(labels.dtype).tiny)
