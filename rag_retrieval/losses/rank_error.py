"""ADR-MSE: the squared error of a document's rank, approximated from its scores, against the rank of its label.

What a reader would get wrong: ranks count from 1 at the best, so that a *higher* score is a *lower* rank. Documents of
one label share the mean of their ranks, which equal scores reach exactly; otherwise ties would have a loss that nothing
can lower.
"""

import torch
from torch import Tensor

from rag_retrieval.losses.graded_groups import count_graded_documents, differences, graded, ordered_pairs
from rag_retrieval.losses.padding import fill_label_padding, fill_padding, reduce_sum


def adr_mse(scores: Tensor, labels: Tensor, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """ADR-MSE: sum over documents i of (r_i - q_i)^2 / log2(1 + r_i), r_i the rank of i by label and
    q_i = 1 + sum_{j != i} sigmoid(s_j - s_i) its approximate rank by score.

    Schlatt et al., "Rank-DistiLLM: Closing the Effectiveness Gap Between Cross-Encoders and LLMs for Passage
    Re-Ranking" (ECIR 2025), approximate discounted rank MSE; the approximate rank is that of Qin et al., "A General
    Approximation Framework for Direct Optimization of Information Retrieval Measures" (2010), with alpha 1.

    scores: [groups, documents], any float dtype; the loss is computed in float32.
    labels: [groups, documents], on any scale (a teacher's scores, too); only their order matters.
    mask: [groups, documents], bool; padding where False. None: nothing is padding.
    reduction: "mean" over the documents of groups with different labels, or "sum".

    Returns a float32 scalar; 0 (with a graph) where no two documents of a group differ in label: such a group is
    skipped. Memory is groups * documents^2. Raises ValueError when the shapes differ or the reduction is unknown.
    """
    scores, labels, mask = fill_padding(scores, labels, mask)
    counted = mask & graded(labels, mask).unsqueeze(1)
    return reduce_sum(_errors(scores, labels, mask, counted).sum(), counted.sum(), reduction)


def chance_adr_mse(labels: Tensor, mask: Tensor | None = None) -> float:
    """Mean ADR-MSE of a constant score, which ranks every document in the middle; 0.0 where no labels differ."""
    labels, mask = fill_label_padding(labels, mask)
    counted = mask & graded(labels, mask).unsqueeze(1)
    constant = torch.zeros_like(labels, dtype=torch.float64)
    return float(_errors(constant, labels, mask, counted).sum()) / max(count_graded_documents(labels, mask), 1)


def _errors(scores: Tensor, labels: Tensor, mask: Tensor, counted: Tensor) -> Tensor:
    """The terms of the sum at [group, document], 0 where not counted."""
    # at [group, i, j]: how far j is above i; the diagonal adds sigmoid(0), which is no document above
    above = differences(scores).neg().sigmoid().masked_fill(~mask.unsqueeze(1), 0.0)
    approximate = 0.5 + above.sum(dim=2)
    ranks = _label_ranks(labels, mask)
    return ((ranks - approximate).square() / torch.log2(1.0 + ranks)).masked_fill(~counted, 0.0)


def _label_ranks(labels: Tensor, mask: Tensor) -> Tensor:
    """Ranks by label, from 1 at the highest; the mean rank where labels are equal. [groups, documents], float32."""
    higher = ordered_pairs(labels, mask).sum(dim=2)
    equal = ((labels.unsqueeze(2) == labels.unsqueeze(1)) & mask.unsqueeze(1)).sum(dim=2)
    return higher + (equal + 1.0) / 2.0
