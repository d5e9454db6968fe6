"""Losses that teach an embedder a reranker's scores of a query's own documents, the scores of its own ensemble, or
another model's vectors of texts that stand alone.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from rag_retrieval.losses.step_rows import StepRows

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
        rest = (step.scores("query_to_doc") / temperature).masked_fill(~others, LOWEST).logsumexp(dim=1)
        candidates = torch.logaddexp(candidates, rest.unsqueeze(1))
    return (weights * (candidates - logits)).masked_fill(~held, 0.0).sum(dim=1)


def self_distillation(step: StepRows, temperature: float = 0.02, use_inbatch_neg: bool = True) -> Tensor:
    """KL(softmax(e / T) || softmax(s / T)) over all documents of the step, float32 [rows]; e are the scores of
    `step.teacher`, an ensemble that s is a part of, without a gradient.

    Chen et al., "BGE M3-Embedding" (2024), section 3.3, less the ensemble's entropy, which has no gradient.
    use_inbatch_neg: False: over the record's own documents alone.
    """
    direction = "query_to_doc" if use_inbatch_neg else "own_documents"
    student, teacher = step.scores(direction) / temperature, step.teacher.scores(direction).detach() / temperature
    if not use_inbatch_neg:
        student, teacher = (scores.masked_fill(step.own_documents < 0, LOWEST) for scores in (student, teacher))
    student, teacher = student.log_softmax(dim=1), teacher.log_softmax(dim=1)
    return (teacher.exp() * (teacher - student)).sum(dim=1)


def _own(step: StepRows) -> tuple[Tensor, Tensor, Tensor]:
    """Scores, teacher scores and a mask of a record's own documents, positive first: [rows, 1 + k]."""
    held = step.own_documents >= 0
    step.observe("own_documents", held)
    return step.scores("own_documents"), step.teacher_scores, held


# ---- vectors -----------------------------------------------------------------------------------------------
#
# The three losses of Zhang et al., "Jasper and Stella: distillation of SOTA embedding models" (2024). RAG-Retrieval's
# trainer weights them with 10 (cosine), 200 (similarity) and 20 (triplets).


def teacher_cosine(step: StepRows) -> Tensor:
    """1 - cos(student's vector, teacher's vector), float32 [rows], at the full width.

    Raises ValueError where the widths differ: the model then needs a projection to the teacher's width.
    """
    student = step.queries.at(step.own_queries, step.width)
    teacher = step.targets.teacher_vectors
    if student.shape[1] != teacher.shape[1]:
        raise ValueError(
            f"the model's vectors have {student.shape[1]} values, the teacher's {teacher.shape[1]}; "
            "give the model a projection to the teacher's width"
        )
    return 1.0 - F.cosine_similarity(student, teacher[step.targets.own][step.rows], dim=1)


def teacher_similarity(step: StepRows) -> Tensor:
    """mean_j (cos(x_i, x_j) - cos(t_i, t_j))^2 over the R records j of the step, itself among them: float32 [rows]; x
    are the student's vectors, t the teacher's, of any width."""
    teacher = step.of_step("teacher", lambda: F.normalize(step.targets.teacher_vectors.float(), dim=1))
    wanted = teacher[step.targets.own][step.rows] @ teacher.T
    return (_similarities(step) - wanted).square().mean(dim=1)


def teacher_triplet(step: StepRows, triplet_margin: float = 0.015) -> Tensor:
    """The mean over all pairs (a, b) of pairs of texts of max(0, cos_a - cos_b + margin), where the teacher finds the
    texts of b at least as similar as those of a; the same for every record: float32 [rows].

    Of R records there are P = R (R - 1) / 2 pairs, and P (P - 1) / 2 pairs of them. They are counted by merging, in
    P log^2 P steps and memory of P, not one by one. 0 for fewer than three texts.
    """
    value, gradient = step.of_step("triplet", lambda: _triplets(step, triplet_margin))
    similarities = _similarities(step)
    own = gradient[step.targets.own][step.rows]
    # the mean couples all records; half of each pair's part belongs to either text, once for each of the R equal terms
    slope = len(gradient) / 2 * (own * (similarities - similarities.detach())).sum(dim=1)
    return value + slope


def _similarities(step: StepRows) -> Tensor:
    """Of the own records with all of the step: [rows, R]."""
    return step.scores("query_to_query")[:, step.targets.queries]


@torch.no_grad()
def _triplets(step: StepRows, margin: float) -> tuple[Tensor, Tensor]:
    """The mean, and its gradient at the similarity of each two records, symmetric: [R, R]."""
    student = step.queries.at(step.targets.queries, step.width)
    teacher = F.normalize(step.targets.teacher_vectors.float(), dim=1)
    records = len(student)
    first, second = torch.triu_indices(records, records, offset=1, device=student.device)
    order = (teacher @ teacher.T)[first, second].argsort(stable=True)
    first, second = first[order], second[order]
    similarities = (student @ student.T)[first, second]
    above, below = discordant(similarities, margin)
    number = max(len(order) * (len(order) - 1) / 2, 1)
    slopes = (above - below).float() / number
    gradient = torch.zeros(records, records, device=student.device)
    gradient[first, second] = slopes
    return (slopes * similarities).sum() + margin * above.sum() / number, gradient + gradient.T


def discordant(values: Tensor, margin: float) -> tuple[Tensor, Tensor]:
    """For each value, how many later ones are not above it by the margin, and above how many earlier ones it is not by
    the margin: int64 [values] each. By merging: runs of 1, 2, 4, ... values against the runs after them."""
    size = 1 << max(len(values) - 1, 0).bit_length()
    padded = F.pad(values, (0, size - len(values)), value=torch.inf)  # stands last, and above all
    above, below = torch.zeros(2, size, dtype=torch.int64, device=values.device)
    run = 1
    while run < size:
        earlier, later = padded.view(-1, 2, run).unbind(dim=1)
        sorted_earlier, sorted_later = earlier.sort(dim=1).values, later.sort(dim=1).values
        above.view(-1, 2, run)[:, 0] += torch.searchsorted(sorted_later, earlier + margin)
        below.view(-1, 2, run)[:, 1] += run - torch.searchsorted(sorted_earlier, later - margin, right=True)
        run *= 2
    return above[: len(values)], below[: len(values)]
