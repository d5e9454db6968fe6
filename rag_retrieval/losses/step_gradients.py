"""Gradients of an embedding loss at what the model gave for the texts of a whole step, in blocks of rows, so that no
matrix of all queries against all documents exists at once. Autograd sees vectors and weights alone, neither the model
nor other processes.
"""

from dataclasses import replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rag_retrieval.losses.embedding import Objective
from rag_retrieval.losses.step_outputs import OutputGradients, StepOutputs
from rag_retrieval.losses.step_rows import OBSERVED, StepRows
from rag_retrieval.losses.step_targets import StepTargets
from rag_retrieval.losses.step_vectors import StepVectors

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

    queries: of Q distinct texts. documents: of D distinct texts, in the same representations. targets: on the same
    device. factor: of the sum of losses, in the gradients. guide: vectors of another model for the same texts, [Q, any]
    and [D, same], by which `false_negative_judge: guide` filters. step: number of finished optimizer steps.
    block_elements: size of a block's largest matrix; results differ by rounding alone.
    """
    own = len(targets.negatives)
    # under autocast the products would be bf16, where .9 moves by .004
    with torch.autocast(targets.queries.device.type, enabled=False), torch.enable_grad():
        guide = guide and tuple(F.normalize(vectors.float(), dim=1) for vectors in guide)
        widths, weights = objective.widths_of(queries.dense.shape[1])
        dense = (queries.dense, documents.dense)
        of_queries, of_documents = (StepVectors(vectors, widths, objective.normalize) for vectors in dense)
        columns = max(len(of_queries), len(of_documents), len(targets.queries), 1)
        columns = max(columns, targets.negatives.shape[1] * of_queries.shape[1])
        rows = max(1, block_elements // (columns * len(widths)))
        losses = torch.zeros(own, device=targets.queries.device)
        whole = StepRows(of_queries, of_documents, targets, slice(0, own), guide, widths=len(widths))
        for start in range(0, own, rows):
            block = replace(whole, rows=slice(start, min(start + rows, own)), block_cache={})
            total = loss_of(objective, block, weights)
            losses[block.rows] = total.detach()
            (factor * total.sum()).backward()
    sums = {"records": own, "near_zero": (losses < NEAR_ZERO).sum()}
    sums |= {name: whole.report.get(name, 0.0) for name in OBSERVED}
    report = {name: float(value) for name, value in sums.items()}
    gradients = (OutputGradients(dense=each.gradient()) for each in (of_queries, of_documents))
    return StepGradients(losses, *gradients, report)


def loss_of(objective: Objective, block: StepRows, width_weights: tuple[float, ...]) -> Tensor:
    """sum_w weight_w sum_l weight_l loss_l of the block's rows at width w, float32 [rows], where a vector at width w is
    its first w values, then normalized: Kusupati et al., "Matryoshka Representation Learning" (2022)."""
    return sum(
        loss_weight * (1.0 if loss.full_width else weight) * loss(replace(block, width=width))
        for width, weight in enumerate(width_weights)
        for loss, loss_weight in objective.terms
        if (width == block.widths - 1 if loss.full_width else weight)
    )
