"""Losses of graded pairs, such as those of STS: the order of cosines, or their values."""

import torch
from torch import Tensor

from rag_retrieval.losses.step_vectors import StepRows


def cosent(step: StepRows, temperature: float = 0.05) -> Tensor:
    """CoSENT: L = log(1 + sum_{i, j: y_i > y_j} exp((s_j - s_i) / T)) over all pairs of records of the step, the same
    for every record: float32 [rows]; s is the cosine of query and document.

    Huang et al., "CoSENT: Consistent Sentence Embedding via Similarity Ranking" (IEEE/ACM TASLP 2024), whose
    scale is 1 / T. Labels are on any scale; only their order matters. 0 where all are equal. Memory is linear in
    the records.
    """
    value, gradient = step.of_step("cosent", lambda: _cosent(step.pair_cosines(), step.targets.labels, temperature))
    _observe(step)
    # L couples all records; its part at the own cosines has this gradient, once for each of the R equal terms
    slope = len(gradient) * gradient[step.targets.own][step.rows]
    cosines = step.positive_cosines()
    return value + slope * (cosines - cosines.detach())


def cosine_regression(step: StepRows) -> Tensor:
    """Squared error of the cosine: (s - y)^2, float32 [rows]; y in [-1, 1], as CosineSimilarityLoss of
    sentence-transformers."""
    _observe(step)
    return (step.positive_cosines() - step.targets.labels[step.targets.own][step.rows]).square()


def _cosent(cosines: Tensor, labels: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The value, and its gradient at all cosines: [R]."""
    with torch.enable_grad():
        leaf = cosines.requires_grad_()
        order = labels.argsort()
        scores, labels = leaf[order] / temperature, labels[order]
        lower = torch.searchsorted(labels, labels, side="left")  # how many records have a lower label
        # at place n: log of the sum of exp(score) of the n lowest labels
        sums = torch.cat([scores.new_full((1,), -torch.inf), scores.logcumsumexp(dim=0)])
        value = torch.cat([scores.new_zeros(1), sums[lower] - scores]).logsumexp(dim=0)
        (gradient,) = torch.autograd.grad(value, leaf)
    return value.detach(), gradient


def _observe(step: StepRows) -> None:
    own = step.own_documents >= 0
    step.observe("own_documents", own, own.new_zeros((), dtype=torch.int64))
