"""Contrastive losses of embeddings over a whole step: a query's positive against other documents and queries, and
graded pairs, such as those of STS, against each other.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from rag_retrieval.losses.step_rows import Direction, StepRows

HardnessMode = Literal["in_batch_negatives", "hard_negatives", "all_negatives"]
MarginType = Literal["absolute", "relative"]
Judge = Literal["model", "guide", "teacher"]


def info_nce(
    step: StepRows,
    temperature: float = 0.02,
    use_inbatch_neg: bool = True,
    directions: Sequence[Direction] = ("query_to_doc",),
    margin: float = 0.0,
    hardness_strength: float = 0.0,
    hardness_mode: HardnessMode = "in_batch_negatives",
    false_negative_margin: float | None = None,
    false_negative_margin_type: MarginType = "absolute",
    false_negative_judge: Judge = "model",
) -> Tensor:
    """InfoNCE: L_i = -s(q_i, d_i+) / T + log sum_x exp(s_x / T), float32 [rows]; s are cosines.

    van den Oord et al., "Representation Learning with Contrastive Predictive Coding" (2018), equation 4. The sum goes
    over all distinct documents of the step, the positive among them, but for those that are no negatives: the query's
    other known positives, and what the filter below leaves out.

    directions: more candidates in the same denominator, "query_to_query" s(q_i, q), "doc_to_query" s(d_i+, q) (with
        the query itself, so that the pair counts twice) and "doc_to_doc" s(d_i+, d) of documents that are not the
        record's own: Li et al., "Towards General Text Embeddings with Multi-stage Contrastive Learning" (2023),
        and what sentence-transformers takes for directions. With query_to_query, doc_to_doc and
        false_negative_margin .1 it is the loss of Zhang et al., "Qwen3 Embedding" (2025).
    use_inbatch_neg: False: the record's own negatives alone are candidates, and there are no other directions.
    margin: subtracted from the positive's cosine, as in PaddleNLP; 0 is off.
    hardness_strength: a >= 0; a negative's term is multiplied with exp(a sg(s)), no gradient through it, for the
        negatives of query_to_doc that hardness_mode names: Lan et al., "LLaVE" (2025), equation 5 (in-batch, a = 9);
        "EmbeddingGemma" (2025) (the record's own hard negatives, a = 5).
    false_negative_margin: m; a candidate is left out where its score exceeds the positive's by more than m
        ("absolute") or more than m times the positive's magnitude ("relative"); m may be negative: relative -.05 leaves
        out what has more than 95% of the positive's score, as NV-Retriever does. None is off. With a guide and 0 it is
        Solatorio, "GISTEmbed" (2024).
    false_negative_judge: whose scores those are: the model's own cosines as they are now, the cosines of a guide's
        vectors, or teacher scores, which exist for the record's own negatives alone.
    """
    filters = (false_negative_margin, false_negative_margin_type, false_negative_judge)
    lowest = torch.finfo(torch.float32).min  # not -inf: a row without candidates in one direction must have a gradient
    partitions = []
    for direction in directions if use_inbatch_neg else ("own_documents",):
        cosines, positive = step.scores(direction), step.positive_columns(direction)
        known = step.allowed(direction)
        allowed = known if false_negative_margin is None else known & ~false_negatives(step, direction, *filters)
        if positive is not None:
            allowed = allowed.scatter(1, positive.unsqueeze(1), True)
        logits = cosines / temperature
        if direction in ("query_to_doc", "own_documents"):
            columns = (step.own_documents >= 0).sum() if direction == "own_documents" else allowed.numel()
            step.observe(direction, allowed, columns - allowed.sum())
            if hardness_strength:
                weighted = _hard_columns(step, direction, hardness_mode)
                logits = logits + hardness_strength * cosines.detach() * weighted
            if margin:
                away = torch.full_like(logits[:, :1], -margin / temperature)
                logits = logits.scatter_add(1, positive.unsqueeze(1), away)
        partitions.append(logits.masked_fill(~allowed, lowest).logsumexp(dim=1))
    return torch.stack(partitions).logsumexp(dim=0) - (step.positive_scores() - margin) / temperature


def false_negatives(
    step: StepRows, direction: Direction, margin: float, margin_type: MarginType, judge: Judge
) -> Tensor:
    """Candidates whose score exceeds the positive's by more than the margin: bool [rows, columns], as `cosines`."""
    if judge == "teacher":
        return _judged_by_teacher(step, direction, margin, margin_type)
    if judge == "model":
        scores, positive = step.scores(direction).detach(), step.positive_scores().detach()
    else:
        scores, positive = step.guide_cosines(direction), step.guide_cosines("own_documents")[:, 0]
    return scores > _threshold(positive, margin, margin_type)


def _judged_by_teacher(step: StepRows, direction: Direction, margin: float, margin_type: MarginType) -> Tensor:
    scores = step.teacher_scores
    above = scores > _threshold(scores[:, 0], margin, margin_type)
    if direction == "own_documents":
        return above
    flagged = torch.zeros_like(step.scores(direction), dtype=torch.bool)
    if direction == "query_to_doc":
        rows, places = (above & (step.own_documents >= 0)).nonzero(as_tuple=True)
        flagged[rows, step.own_documents[rows, places]] = True
    return flagged


def _threshold(positive: Tensor, margin: float, margin_type: MarginType) -> Tensor:
    """[rows, 1]."""
    return (positive + margin * (positive.abs() if margin_type == "relative" else 1.0)).unsqueeze(1)


def _hard_columns(step: StepRows, direction: Direction, mode: HardnessMode) -> Tensor:
    """The negatives of query_to_doc or own_documents whose terms are weighted: bool, as `cosines`."""
    if direction == "own_documents":
        own = torch.ones_like(step.own_documents, dtype=torch.bool)
    else:
        own = step.is_own_document()
    chosen = {"in_batch_negatives": ~own, "hard_negatives": own, "all_negatives": torch.ones_like(own)}[mode]
    return chosen.scatter(1, step.positive_columns(direction).unsqueeze(1), False)


# ---- graded pairs ------------------------------------------------------------------------------------------


def cosent(step: StepRows, temperature: float = 0.05) -> Tensor:
    """CoSENT: L = log(1 + sum_{i, j: y_i > y_j} exp((s_j - s_i) / T)) over all pairs of records of the step, the same
    for every record: float32 [rows]; s is the cosine of query and document.

    Huang et al., "CoSENT: Consistent Sentence Embedding via Similarity Ranking" (IEEE/ACM TASLP 2024), whose
    scale is 1 / T. Labels are on any scale; only their order matters. 0 where all are equal. Memory is linear in
    the records.
    """
    value, gradient = step.of_step("cosent", lambda: _cosent(step.pair_scores(), step.targets.labels, temperature))
    step.observe("own_documents", step.own_documents >= 0)
    # L couples all records; its part at the own cosines has this gradient, once for each of the R equal terms
    slope = len(gradient) * gradient[step.targets.own][step.rows]
    cosines = step.positive_scores()
    return value + slope * (cosines - cosines.detach())


def cosine_regression(step: StepRows) -> Tensor:
    """Squared error of the cosine: (s - y)^2, float32 [rows]; y in [-1, 1], as CosineSimilarityLoss of
    sentence-transformers."""
    step.observe("own_documents", step.own_documents >= 0)
    return (step.positive_scores() - step.targets.labels[step.targets.own][step.rows]).square()


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
