"""Regularization of lexical weights, which keeps texts short in terms and an index of them fast."""

from torch import Tensor

from rag_retrieval.losses.embedding import Flops
from rag_retrieval.losses.step_weights import StepWeights


def flops(weights: Flops, queries: StepWeights, documents: StepWeights, step: int) -> Tensor:
    """ramp * (lambda_q Omega(queries) + lambda_d Omega(documents)), a float32 scalar; Omega = sum_j (mean over texts of
    w_j)^2, over the distinct texts of the whole step.

    Paria et al., "Minimizing FLOPs to Learn Efficient Sparse Representations" (2020), for SPLADE: Formal et al.,
    "SPLADE v2" (2021), equation 4 and section 3; ramp = (step / ramp_steps)^2, at most 1. step: number of finished
    optimizer steps. The square makes it a value of a step's texts together: means of parts would give another.
    """
    ramp = min(1.0, step / weights.ramp_steps) ** 2 if weights.ramp_steps else 1.0
    omega = weights.lambda_query * queries.square_of_means() + weights.lambda_document * documents.square_of_means()
    return ramp * omega
