"""Losses that learn from a teacher's scores: MarginMSE, and the KL divergence between softmax distributions.

What a reader would get wrong: the second argument is no label. Teacher scores are logits on any scale, no document is a
positive, and equal teacher scores are something to learn as well; only a group of one document teaches nothing, since
both losses see differences alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rag_retrieval.losses.listwise import softmax_logits
from rag_retrieval.losses.padding import centred, fill_label_padding, fill_padding, reduce_sum


def margin_mse(scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None, reduction: str = "mean") -> Tensor:
    """MarginMSE: the mean over all pairs of documents i < j of a group of ((s_i - s_j) - (t_i - t_j))^2.

    Hofstätter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation"
    (2020), Margin-MSE. The paper takes triples, one relevant document and another one; here a teacher has scored whole
    groups, and all their pairs count. A group of two documents is a triple of the paper.

    scores: [groups, documents], any float dtype; the loss is computed in float32.
    teacher_scores: [groups, documents], the teacher's logits.
    mask: [groups, documents], bool; padding where False. None: nothing is padding.
    reduction: "mean" over all pairs of all groups, or "sum".

    Returns a float32 scalar; 0 (with a graph) where every group has one document. Raises ValueError when the
    shapes differ or the reduction is unknown.
    """
    scores, teacher_scores, mask = fill_padding(scores, teacher_scores, mask)
    sizes = mask.sum(dim=1)
    return reduce_sum(_pair_errors(scores - teacher_scores, mask, sizes).sum(), _pairs(sizes).sum(), reduction)


def kl_distillation(
    scores: Tensor,
    teacher_scores: Tensor,
    mask: Tensor | None = None,
    reduction: str = "mean",
    temperature: float = 1.0,
) -> Tensor:
    """KL distillation: T^2 sum_j P_j(t) (log P_j(t) - log P_j(s)), with P_j(v) = exp(v_j / T) / sum_k exp(v_k / T).

    Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), the softmax of equation 1 over the documents
    of a group. The factor T^2 (their section 2) keeps the gradient's size beside another loss when T changes.

    scores, teacher_scores, mask, errors: as in `margin_mse`.
    reduction: "mean" over the groups of at least two documents, or "sum".
    temperature: T > 0; above 1 it gives weight to documents that the teacher ranks low.

    Returns a float32 scalar; 0 (with a graph) where every group has one document.
    """
    scores, teacher_scores, mask = fill_padding(scores, teacher_scores, mask)
    losses = temperature**2 * _divergence(scores, teacher_scores, mask, temperature)
    return reduce_sum(losses, (mask.sum(dim=1) > 1).sum(), reduction)


def count_document_pairs(teacher_scores: Tensor, mask: Tensor | None = None) -> int:
    """Number of unordered pairs of documents of a group: what the mean of `margin_mse` divides by.

    teacher_scores, mask: [groups, documents]. Call it on CPU tensors: on a GPU it waits for the device.
    """
    return int(_pairs(fill_label_padding(teacher_scores, mask)[1].sum(dim=1)).sum())


def count_groups_of_several(teacher_scores: Tensor, mask: Tensor | None = None) -> int:
    """Number of groups of at least two documents: what the mean of `kl_distillation` divides by."""
    return int((fill_label_padding(teacher_scores, mask)[1].sum(dim=1) > 1).sum())


def chance_margin_mse(teacher_scores: Tensor, mask: Tensor | None = None) -> float:
    """Mean MarginMSE of a constant score: the mean squared difference of two teacher scores of a group.

    Every constant gives the same. 0.0 where there is no pair.
    """
    teacher_scores, mask = fill_label_padding(teacher_scores, mask)
    sizes = mask.sum(dim=1)
    return float(_pair_errors(teacher_scores.double(), mask, sizes).sum()) / max(int(_pairs(sizes).sum()), 1)


def chance_kl_distillation(teacher_scores: Tensor, mask: Tensor | None = None, temperature: float = 1.0) -> float:
    """Mean KL distillation loss of a constant score: T^2 (log(documents) - entropy of the teacher).

    Every constant gives the same. 0.0 where every group has one document.
    """
    teacher_scores, mask = fill_label_padding(teacher_scores, mask)
    teacher_scores = teacher_scores.double()
    total = _divergence(torch.zeros_like(teacher_scores), teacher_scores, mask, temperature)
    return temperature**2 * float(total) / max(int((mask.sum(dim=1) > 1).sum()), 1)


def _pairs(sizes: Tensor) -> Tensor:
    return sizes * (sizes - 1) // 2


def _pair_errors(errors: Tensor, mask: Tensor, sizes: Tensor) -> Tensor:
    """sum_{i < j} (e_i - e_j)^2 of each group, [groups], as n sum_i (e_i - mean)^2: memory stays groups * documents."""
    return sizes * centred(errors, mask).masked_fill(~mask, 0.0).square().sum(dim=1)


def _divergence(scores: Tensor, teacher_scores: Tensor, mask: Tensor, temperature: float) -> Tensor:
    """The summed KL divergence of all groups, a scalar; a group of one document has none."""
    student = F.log_softmax(softmax_logits(scores, mask, temperature), dim=1)
    teacher = F.log_softmax(softmax_logits(teacher_scores, mask, temperature), dim=1)
    return (teacher.exp() * (teacher - student)).masked_fill(~mask, 0.0).sum()
