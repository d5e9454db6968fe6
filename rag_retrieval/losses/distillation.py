"""Losses that learn from a teacher's scores: MarginMSE, and the KL divergence between softmax distributions.

Teacher scores are logits on any scale. No document is a positive, and equal teacher scores are something to learn as
well; only a group of one document teaches nothing, since both losses depend on differences alone.
"""

import torch.nn.functional as F
from torch import Tensor

from rag_retrieval.losses.groups import centred, fill_padding
from rag_retrieval.losses.listwise import softmax_logits


def margin_mse(scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """MarginMSE: the sum over all pairs of documents i < j of a group of ((s_i - s_j) - (t_i - t_j))^2.

    Hofstätter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation"
    (2020), Margin-MSE. The paper takes triples, one relevant document and another one; here a teacher has scored whole
    groups, and all their pairs count. A group of two documents is a triple of the paper.

    scores: [groups, documents], any float dtype; the loss is computed in float32.
    teacher_scores: [groups, documents], the teacher's logits.
    mask: [groups, documents], bool; padding where False. None: nothing is padding.

    Returns the sum and the number of pairs: a float32 scalar, 0 (with a graph) where every group has one document, and
    an integer scalar. Raises ValueError when the shapes differ.
    """
    scores, teacher_scores, mask = fill_padding(scores, teacher_scores, mask)
    sizes = mask.sum(dim=1)
    # n sum_i (e_i - mean)^2 is sum_{i < j} (e_i - e_j)^2: memory stays groups * documents
    errors = centred(scores - teacher_scores, mask).masked_fill(~mask, 0.0)
    return (sizes * errors.square().sum(dim=1)).sum(), (sizes * (sizes - 1) // 2).sum()


def kl_distillation(
    scores: Tensor, teacher_scores: Tensor, mask: Tensor | None = None, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """KL distillation: T^2 sum_j P_j(t) (log P_j(t) - log P_j(s)), with P_j(v) = exp(v_j / T) / sum_k exp(v_k / T).

    Hinton et al., "Distilling the Knowledge in a Neural Network" (2015), the softmax of equation 1 over the documents
    of a group. The factor T^2 (their section 2) keeps the gradient's size beside another loss when T changes.

    scores, teacher_scores, mask, errors: as in `margin_mse`.
    temperature: T > 0; above 1 it gives weight to documents that the teacher ranks low.

    Returns the sum and the number of groups of at least two documents.
    """
    scores, teacher_scores, mask = fill_padding(scores, teacher_scores, mask)
    student = F.log_softmax(softmax_logits(scores, mask, temperature), dim=1)
    teacher = F.log_softmax(softmax_logits(teacher_scores, mask, temperature), dim=1)
    divergence = (teacher.exp() * (teacher - student)).masked_fill(~mask, 0.0).sum()
    return temperature**2 * divergence, (mask.sum(dim=1) > 1).sum()
