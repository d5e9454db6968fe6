"""Losses that teach an embedder a reranker's scores of a query's own documents."""

import torch
from torch import Tensor

from rag_retrieval.losses.step_vectors import StepRows

LOWEST = torch.finfo(torch.float32).min


def margin_mse(step: StepRows, temperature: float = 0.05) -> Tensor:
    """MarginMSE: the mean over a record's negatives of ((s+ - s-) / T - (t+ - t-))^2, float32 [rows]; s are cosines
    and t teacher scores.

    Hofstätter et al., "Improving Efficient Neural Ranking Models with Cross-Architecture Knowledge Distillation"
    (2020). temperature: brings margins of cosines, at most 2, to the teacher's scale; 1 for products of vectors.
    0 for a record without negatives.
    """
    scores, teacher, held = _own(step)
    errors = (scores[:, :1] - scores) / temperature - (teacher[:, :1] - teacher)
    return errors.square().masked_fill(~held, 0.0).sum(dim=1) / (held.sum(dim=1) - 1).clamp(min=1)


def kl_distillation(step: StepRows, temperature: float = 0.02, teacher_temperature: float = 1.0) -> Tensor:
    """KL divergence of distributions over a record's own documents: KL(softmax(t / T_t) || softmax(s / T)), float32
    [rows]; s are cosines and t teacher scores.

    Hinton et al., "Distilling the Knowledge in a Neural Network" (2015). There is no factor T^2: the gradient has the
    size of that of InfoNCE at T, so that both can be added. FlagEmbedding's kl_div is this (at teacher_temperature 1)
    plus the teacher's entropy, which has no gradient.
    """
    scores, teacher, held = _own(step)
    student = (scores / temperature).masked_fill(~held, LOWEST).log_softmax(dim=1)
    target = (teacher / teacher_temperature).masked_fill(~held, LOWEST).log_softmax(dim=1)
    return (target.exp() * (target - student)).masked_fill(~held, 0.0).sum(dim=1)


def m3_distillation(
    step: StepRows, temperature: float = 0.02, teacher_temperature: float = 1.0, use_inbatch_neg: bool = True
) -> Tensor:
    """sum_c p_c (-s_c / T + log(sum_{c' >= c} exp(s_c' / T) + sum_x exp(s_x / T))), float32 [rows]: the cross entropy
    of each of a record's own documents c in turn, positive first, without those before it, against all other documents
    x of the step; p = softmax(t / T_t) of teacher scores t.

    m3_kd_loss of FlagEmbedding, of Chen et al., "BGE M3-Embedding" (2024), with teacher_temperature 1. What
    the data name as positive of the query is none of x. use_inbatch_neg: False leaves x out.
    """
    scores, teacher, held = _own(step)
    logits = (scores / temperature).masked_fill(~held, LOWEST)
    weights = (teacher / teacher_temperature).masked_fill(~held, LOWEST).softmax(dim=1)
    candidates = logits.flip(1).logcumsumexp(dim=1).flip(1)  # of c and those after it
    if use_inbatch_neg:
        others = step.allowed("query_to_doc") & ~step.is_own_document()
        rest = (step.cosines("query_to_doc") / temperature).masked_fill(~others, LOWEST).logsumexp(dim=1)
        candidates = torch.logaddexp(candidates, rest.unsqueeze(1))
    return (weights * (candidates - logits)).masked_fill(~held, 0.0).sum(dim=1)


def _own(step: StepRows) -> tuple[Tensor, Tensor, Tensor]:
    """Cosines, teacher scores and a mask of a record's own documents, positive first: [rows, 1 + k]."""
    held = step.own_documents >= 0
    step.observe("own_documents", held, held.new_zeros((), dtype=torch.int64))
    return step.cosines("own_documents"), step.teacher_scores, held
