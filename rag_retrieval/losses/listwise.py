"""Losses over a whole group: softmax cross entropies (listwise CE, ListNet, InfoNCE), the likelihood of the right
ranking (ListMLE), and the error of ranks (ADR-MSE).

They differ in what they take for a positive: for `listwise_ce` a label of exactly 1, one per group, which reading the
data has to guarantee; for `info_nce` every document above the lowest label of its group. The others take all labels.

In each function: scores [groups, documents], any float dtype (the loss is computed in float32); labels [groups,
documents]; mask [groups, documents], bool, padding where False, None where nothing is padding. It returns the sum, a
float32 scalar that is 0 (with a graph) where there is nothing to learn, and the number of items that a mean divides
by, an integer scalar. It raises ValueError when the shapes differ.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rag_retrieval.losses.groups import centred, differences, fill_padding, graded, ordered_pairs


def listwise_ce(
    scores: Tensor, labels: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Listwise cross entropy: - log( exp(s_+ / T) / sum_j exp(s_j / T) ), s_+ the score of the positive.

    The ListNet loss with all of the target on one document, a cross entropy of top-one probabilities: Cao et
    al., "Learning to Rank: From Pairwise Approach to Listwise Approach" (ICML 2007).

    labels: one 1 per group and 0 elsewhere. A group of two positives adds both terms and counts once.
    temperature: T > 0; below 1 it sharpens the distribution. ValueError where it is not positive.

    Counts the groups that have a positive; a group of one document gives 0.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    logits = softmax_logits(scores, mask, temperature)
    positive = labels == 1.0  # never at padding, whose labels have been filled with 0
    losses = -F.log_softmax(logits, dim=1).masked_fill(~positive, 0.0)
    return losses.sum(), positive.any(dim=1).sum()


def listnet(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ListNet: - sum_j P_j(y) log P_j(s), with P_j(v) = exp(v_j) / sum_k exp(v_k), of labels y and scores s.

    Cao et al., "Learning to Rank: From Pairwise Approach to Listwise Approach" (ICML 2007): the cross entropy
    of the top-one probabilities, with exp for their increasing function phi.

    labels: on any scale; the scale says how sharp the target is. Labels 1, 0, 0, 0 make a flat one (0.48 and 0.17
        thrice), and the least loss is its entropy, not 0.

    Counts the groups with documents of different labels; the others are skipped, though the formula would ask them for
    equal scores.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    target = softmax_logits(labels, mask).softmax(dim=1)
    losses = -target * F.log_softmax(softmax_logits(scores, mask), dim=1)
    of_graded = graded(labels, mask)
    losses = losses.masked_fill(~(mask & of_graded.unsqueeze(1)), 0.0)
    return losses.sum(), of_graded.sum()


def info_nce(
    scores: Tensor, labels: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """InfoNCE: for each positive p, - log( exp(s_p / T) / (exp(s_p / T) + sum_n exp(s_n / T)) ), n the negatives
    of its group. Its other positives do not compete with it.

    Van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (2018), equation 4, with the
    documents of the group as the candidates. With one positive it is `listwise_ce`.

    labels: on any scale; positives are above the lowest label of their group. temperature: as in `listwise_ce`.

    Counts the positives.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    scores, positive = centred(scores, mask), ordered_pairs(labels, mask).any(dim=1)
    logits = softmax_logits(scores, mask & ~positive, temperature)
    # log(1 + exp(negatives - positive)), which neither overflows nor loses a small loss to rounding
    losses = F.softplus(logits.logsumexp(dim=1, keepdim=True) - scores / temperature)
    return losses.masked_fill(~positive, 0.0).sum(), positive.sum()


def softmax_logits(values: Tensor, mask: Tensor, temperature: float = 1.0) -> Tensor:
    """values / temperature, and the lowest float32 where mask is False, which takes no share of a softmax.

    Not -inf: a row that is padding throughout would pass through nan, which autograd's anomaly detection, switched on
    to hunt another nan, would report. Raises ValueError when the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature {temperature} is not positive; 1.0 leaves the scores as they are.")
    return (values / temperature).masked_fill(~mask, torch.finfo(torch.float32).min)


# ---- the likelihood of the right ranking -------------------------------------------------------------------


def listmle(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ListMLE: sum over documents i of log( sum_{j: y_j <= y_i} exp(s_j) ) - s_i, without those of the lowest label.

    Xia et al., "Listwise Approach to Learning to Rank: Theory and Algorithm" (ICML 2008), the likelihood loss: the
    negative log of the Plackett-Luce probability of the right ranking. Ties as in Breslow, "Covariance Analysis of
    Censored Survival Data" (Biometrics 1974): documents of one label draw from the same pool, all documents that are
    not above them, so that the order of a file changes nothing. Those of the lowest label draw nothing, since any order
    among them is right, as in the likelihood of a top-k ranking. With one positive it is `listwise_ce`.

    labels: on any scale; only their order matters.

    Counts the groups with documents of different labels. Memory is groups * documents^2.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    return _likelihood_terms(scores, labels, mask).sum(), graded(labels, mask).sum()


def position_listmle(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Position-aware ListMLE: the terms of `listmle`, each weighted with a(r) = 2^(n - r) - 1, r the document's rank
    by label from 1 to n, divided by the sum of all n weights.

    Lan et al., "Position-Aware ListMLE: A Sequential Learning Process for Ranking" (UAI 2014), which gives these
    weights; the division is ours and keeps groups of different size comparable. Documents of one label share the mean
    of their weights. Everything else as in `listmle`.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    losses = _likelihood_terms(scores, labels, mask) * _position_weights(labels, mask)
    return losses.sum(), graded(labels, mask).sum()


def _likelihood_terms(scores: Tensor, labels: Tensor, mask: Tensor) -> Tensor:
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


# ---- the error of ranks ------------------------------------------------------------------------------------


def adr_mse(scores: Tensor, labels: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """ADR-MSE: sum over documents i of (r_i - q_i)^2 / log2(1 + r_i), r_i the rank of i by label and
    q_i = 1 + sum_{j != i} sigmoid(s_j - s_i) its approximate rank by score, both from 1 at the best.

    Schlatt et al., "Rank-DistiLLM: Closing the Effectiveness Gap Between Cross-Encoders and LLMs for Passage
    Re-Ranking" (ECIR 2025), approximate discounted rank MSE; the approximate rank is that of Qin et al., "A General
    Approximation Framework for Direct Optimization of Information Retrieval Measures" (2010), with alpha 1.

    labels: on any scale (a teacher's scores, too); only their order matters. Documents of one label share the mean of
        their ranks, which equal scores reach exactly; otherwise ties would have a loss that nothing can lower.

    Counts the documents of groups with different labels; other groups are skipped. Memory is groups * documents^2.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    counted = mask & graded(labels, mask).unsqueeze(1)
    # at [group, i, j]: how far j is above i; the diagonal adds sigmoid(0), which is no document above
    above = differences(scores).neg().sigmoid().masked_fill(~mask.unsqueeze(1), 0.0)
    approximate = 0.5 + above.sum(dim=2)
    ranks = _label_ranks(labels, mask)
    losses = ((ranks - approximate).square() / torch.log2(1.0 + ranks)).masked_fill(~counted, 0.0)
    return losses.sum(), counted.sum()


def _label_ranks(labels: Tensor, mask: Tensor) -> Tensor:
    """Ranks by label, from 1 at the highest; the mean rank where labels are equal. [groups, documents], float32."""
    higher = ordered_pairs(labels, mask).sum(dim=2)
    equal = ((labels.unsqueeze(2) == labels.unsqueeze(1)) & mask.unsqueeze(1)).sum(dim=2)
    return higher + (equal + 1.0) / 2.0
