"""Gradients of an embedding loss at what the model gave for the texts of a whole step, in blocks of rows, so that no
matrix of all queries against all documents exists at once. Autograd sees vectors and weights alone, neither the model
nor other processes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rag_retrieval.losses.embedding import (
    DENSE,
    ENSEMBLE,
    LEXICAL,
    MULTI_VECTOR,
    SELF_DISTILLATION,
    EmbeddingLoss,
    Objective,
)
from rag_retrieval.losses.step_outputs import OutputGradients, StepOutputs
from rag_retrieval.losses.step_rows import OBSERVED, EnsembleRows, StepRows, StepTexts
from rag_retrieval.losses.step_targets import StepTargets
from rag_retrieval.losses.step_tokens import StepTokens
from rag_retrieval.losses.step_vectors import StepVectors
from rag_retrieval.losses.step_weights import StepWeights, flops

BLOCK_ELEMENTS = 1 << 22  # of one matrix of a block, over all widths: 16 MB in float32; some ten of them live at once
NEAR_ZERO = 1e-4  # a loss that teaches nothing


class StepGradients(NamedTuple):
    """losses: float32 [own], one for each own record. queries, documents: the gradients of factor * losses.sum() at
    all outputs of the step. report: sums over own records, for `embedding_report.log_values`; the same names in every
    process."""

    losses: Tensor
    queries: OutputGradients
    documents: OutputGradients
    report: dict[str, float]


def representation_gradients(
    objective: Objective,
    queries: StepOutputs,
    documents: StepOutputs,
    targets: StepTargets,
    factor: float,
    guide: tuple[Tensor, Tensor] | None = None,
    step: int = 0,
    block_elements: int = BLOCK_ELEMENTS,
) -> StepGradients:
    """Losses of a process's own records, and what they add to the gradient at every text of the step.

    Sums of these gradients over processes are the gradient of the whole step.

    queries: of Q distinct texts. documents: of D distinct texts, in the same representations, those of the objective.
    targets: on the same device. factor: of the sum of losses, in the gradients. guide: vectors of another model for the
    same texts, [Q, any] and [D, same], by which `false_negative_judge: guide` filters. step: number of finished
    optimizer steps. block_elements: size of a block's largest matrix; results differ by rounding alone.
    """
    own = len(targets.negatives)
    losses = torch.zeros(own, device=targets.queries.device)
    # under autocast the products would be bf16, where .9 moves by .004
    with torch.autocast(losses.device.type, enabled=False), torch.enable_grad():
        of_queries, of_documents = (texts_of(objective, each) for each in (queries, documents))
        guide = guide and tuple(F.normalize(vectors.float(), dim=1) for vectors in guide)
        whole = rows_of_step(objective, of_queries, of_documents, targets, guide)
        documents_of_record = 1 + targets.negatives.shape[1]
        elements = [each.row_elements(of_documents[name], documents_of_record) for name, each in of_queries.items()]
        size = max(1, block_elements // max(1, len(targets.queries), *elements))
        for start in range(0, own, size):
            block = block_of_rows(objective, whole, slice(start, min(start + size, own)))
            total = unified_loss(objective, block, step)
            losses[start : start + size] = total.detach()
            (factor * total.sum()).backward()
        sums = {"records": own, "near_zero": (losses < NEAR_ZERO).sum()}
        if objective.flops is not None:
            # the same for every record, as it is of all texts of the step
            added = flops(objective.flops, of_queries[LEXICAL], of_documents[LEXICAL], step)
            (factor * own * added).backward()
            losses += added.detach()
    for name, rows in whole.items():
        sums |= {f"{name}/{value}": rows.report.get(value, 0.0) for value in ("loss", *OBSERVED)}
    if LEXICAL in whole:
        share = own / max(len(targets.queries), 1)  # all processes have all texts
        for name, side in (("query", of_queries[LEXICAL]), ("document", of_documents[LEXICAL])):
            sums |= {f"{name}_terms": share * side.live(), f"{name}_texts": share * len(side)}
    report = {name: float(value) for name, value in sums.items()}
    gradients = [
        OutputGradients(**{name: each.gradient() for name, each in side.items()}) for side in (of_queries, of_documents)
    ]
    return StepGradients(losses, *gradients, report)


def texts_of(objective: Objective, outputs: StepOutputs) -> dict[str, StepTexts]:
    """By representation, those that there are."""
    texts = {}
    if outputs.dense is not None:
        widths, _ = objective.widths_of(outputs.dense.shape[1])
        texts[DENSE] = StepVectors(outputs.dense, widths, objective.normalize)
    if outputs.lexical is not None:
        texts[LEXICAL] = StepWeights(*outputs.lexical)
    if outputs.multi_vector is not None:
        texts[MULTI_VECTOR] = StepTokens(*outputs.multi_vector, mean=objective.multi_vector_mean)
    assert texts.keys() == objective.loss_weights.keys() - {ENSEMBLE}, (list(texts), objective.loss_weights)
    return texts


def rows_of_step(
    objective: Objective,
    queries: Mapping[str, StepTexts],
    documents: Mapping[str, StepTexts],
    targets: StepTargets,
    guide: tuple[Tensor, Tensor] | None,
) -> dict[str, StepRows]:
    """All own records, by each representation and the ensemble."""
    rows = slice(0, len(targets.negatives))
    whole = {}
    for name, texts in queries.items():
        _, weights = objective.widths_of(texts.shape[1]) if name == DENSE else ((), (1.0,))
        whole[name] = StepRows(texts, documents[name], targets, rows, guide, width_weights=weights)
    if ENSEMBLE in objective.loss_weights:
        first = next(iter(whole.values()))
        whole[ENSEMBLE] = EnsembleRows(first.queries, first.documents, targets, rows, guide)
    return whole


def block_of_rows(objective: Objective, whole: Mapping[str, StepRows], rows: slice) -> dict[str, StepRows]:
    """Some of the records, by each representation and by their ensemble, which shares their scores."""
    block = {name: replace(each, rows=rows, block_cache={}) for name, each in whole.items()}
    if ENSEMBLE in block:
        parts = tuple((weight, block[name].at_width(-1)) for name, weight in objective.ensemble_weights.items())
        block[ENSEMBLE] = replace(block[ENSEMBLE], parts=parts)
    return block


def unified_loss(objective: Objective, block: Mapping[str, StepRows], step: int) -> Tensor:
    """sum_r weight_r L_r over representations r and their ensemble, float32 [rows]. Once self-distillation has begun,
    the mean of that and of sum_r weight_r KL_r, the distances of each from the ensemble.

    Chen et al., "BGE M3-Embedding" (2024), section 3.3.
    """
    total = 0.0
    for name, weight in objective.loss_weights.items():
        loss = loss_of(objective.terms, block[name])
        report = block[name].report
        report["loss"] = report.get("loss", 0.0) + loss.detach().sum()
        total = total + weight * loss
    taught = objective.self_distillation
    if taught is None or step <= taught.start_step:
        return total
    options = {"temperature": taught.temperature, "use_inbatch_neg": taught.use_inbatch_neg}
    terms = ((replace(SELF_DISTILLATION, option_values=options), 1.0),)
    distances = (
        weight * loss_of(terms, replace(block[name], teacher=block[ENSEMBLE]))
        for name, weight in taught.weights.items()
    )
    return (total + sum(distances)) / 2


def loss_of(terms: Sequence[tuple[EmbeddingLoss, float]], rows: StepRows) -> Tensor:
    """sum_w weight_w sum_l weight_l loss_l of the rows at width w, float32 [rows], where a dense vector at width w is
    its first w values, then normalized: Kusupati et al., "Matryoshka Representation Learning" (2022)."""
    return sum(
        loss_weight * (1.0 if loss.full_width else weight) * loss(rows.at_width(width))
        for width, weight in enumerate(rows.width_weights)
        for loss, loss_weight in terms
        if (width == len(rows.width_weights) - 1 if loss.full_width else weight)
    )
