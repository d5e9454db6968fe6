"""The lexical weights of a step's texts, as leaves of autograd: s(q, d) = sum of w_q w_d over the ids of both.

No tensor has the width of the vocabulary: a block of texts is a matrix over the ids that occur in it, [rows, ids], and
the texts that it is compared with are laid out over the same ids, some at a time. That is exact, since an id that one
side lacks adds nothing.
"""

from typing import Any

import torch
from torch import Tensor

from rag_retrieval.losses.embedding import Flops
from rag_retrieval.losses.step_outputs import Ragged
from rag_retrieval.losses.step_vectors import ALL, Places

CHUNK_ELEMENTS = 1 << 22  # of the matrix of the texts that a block is compared with: 16 MB in float32


class StepWeights:
    """ids: int64 [entries], each at most once in a text. weights: float32 [entries], >= 0. counts: int64 [texts]."""

    def __init__(self, ids: Tensor, weights: Tensor, counts: Tensor):
        self.ids, self.texts = ids, Ragged(counts)
        self.weights = weights.detach().clone().requires_grad_()
        self.vocabulary = int(ids.max()) + 1 if len(ids) else 0

    def __len__(self) -> int:
        return len(self.texts)

    def row_elements(self, others: "StepWeights", own: int) -> int:
        """Values that a record of a block adds to its largest matrix. own: number of documents of a record."""
        longest = int(others.texts.counts.max()) if len(others) else 0
        return max(len(self), len(others), len(self.ids.unique()), own * longest)

    def against(self, places: Places, others: "StepWeights", other_places: Places = ALL) -> list[Tensor]:
        """Scores of the texts at places [n] with those of others at other_places [m]: [[n, m]]."""
        matrix, columns = self._matrix(places, others)
        other_places = others.texts.all[other_places]
        rows, shared, weights = others._shared(other_places, columns)
        return [_Product.apply(matrix, rows, shared, weights, len(other_places))]

    def with_own(self, places: Tensor, others: "StepWeights", other_places: Tensor) -> list[Tensor]:
        """Scores of the texts at places [n] with those of theirs at other_places [n, k]: [[n, k]]."""
        matrix, columns = self._matrix(places, others)
        pairs, shared, weights = others._shared(other_places.flatten(), columns)
        of_text = pairs.div(max(other_places.shape[1], 1), rounding_mode="floor") * matrix.shape[1] + shared
        products = matrix.flatten().index_select(0, of_text) * weights
        return [weights.new_zeros(other_places.numel()).index_add(0, pairs, products).view(other_places.shape)]

    def _matrix(self, places: Places, others: "StepWeights") -> tuple[Tensor, Tensor]:
        """Weights of the texts at places [n] over the distinct ids of these, [n, ids]; and the column of each id of the
        vocabulary, -1 for an id that they lack."""
        places = self.texts.all[places]
        rows, entries = self.texts.entries_of(places)
        ids = self.ids[entries]
        columns = torch.full((max(self.vocabulary, others.vocabulary),), -1, device=ids.device)
        columns[ids] = 0
        distinct = (columns == 0).nonzero().squeeze(1)
        columns[distinct] = torch.arange(len(distinct), device=ids.device)
        matrix = self.weights.new_zeros(len(places), len(distinct))
        return matrix.index_put((rows, columns[ids]), self.weights.index_select(0, entries)), columns

    def _shared(self, places: Tensor, columns: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The entries of the texts at places [m] whose id has a column: row, column and weight of each."""
        rows, entries = self.texts.entries_of(places)
        shared = columns[self.ids[entries]]
        kept = shared >= 0
        return rows[kept], shared[kept], self.weights.index_select(0, entries[kept])

    def square_of_means(self) -> Tensor:
        """sum_j (mean over the texts of w_j)^2, a scalar with a graph; 0 without texts."""
        sums = self.weights.new_zeros(self.vocabulary).index_add(0, self.ids, self.weights)
        return (sums / max(len(self), 1)).square().sum()

    def live(self) -> Tensor:
        """Number of entries above 0, of all texts."""
        return (self.weights > 0).sum()

    def gradient(self) -> Tensor:
        """Of all that was back-propagated, at the weights: float32 [entries]."""
        return torch.zeros_like(self.weights) if self.weights.grad is None else self.weights.grad


class _Product(torch.autograd.Function):
    """matrix [n, ids] times the transpose of a sparse matrix [m, ids], which is laid out some rows at a time."""

    @staticmethod
    def forward(ctx: Any, matrix: Tensor, rows: Tensor, columns: Tensor, weights: Tensor, number: int) -> Tensor:
        """rows, ascending, columns and weights: of the sparse matrix's entries. number: m."""
        ctx.save_for_backward(matrix, rows, columns, weights)
        ctx.number = number
        product = matrix.new_empty(len(matrix), number)
        for start, end, _, laid_out in _chunks(matrix, rows, columns, weights, number):
            product[:, start:end] = matrix @ laid_out.T
        return product

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        matrix, rows, columns, weights = ctx.saved_tensors
        of_matrix, of_weights = torch.zeros_like(matrix), torch.zeros_like(weights)
        for start, end, entries, laid_out in _chunks(matrix, rows, columns, weights, ctx.number):
            of_matrix += gradient[:, start:end] @ laid_out
            of_weights[entries] = (gradient[:, start:end].T @ matrix)[rows[entries] - start, columns[entries]]
        return of_matrix, None, None, of_weights, None


def _chunks(matrix: Tensor, rows: Tensor, columns: Tensor, weights: Tensor, number: int):
    """Of the sparse matrix: first and last row, the slice of their entries, and these rows laid out."""
    size = max(1, CHUNK_ELEMENTS // max(matrix.shape[1], 1))
    starts = list(range(0, number, size))
    edges = torch.searchsorted(rows, torch.tensor([*starts, number], device=rows.device)).tolist()
    for start, first, last in zip(starts, edges[:-1], edges[1:], strict=True):
        end, entries = min(start + size, number), slice(first, last)
        laid_out = matrix.new_zeros(end - start, matrix.shape[1])
        laid_out[rows[entries] - start, columns[entries]] = weights[entries]
        yield start, end, entries, laid_out


def flops(weights: Flops, queries: StepWeights, documents: StepWeights, step: int) -> Tensor:
    """ramp * (lambda_q Omega(queries) + lambda_d Omega(documents)), a float32 scalar; Omega = sum_j (mean over texts of
    w_j)^2, over the distinct texts of the whole step.

    Paria et al., "Minimizing FLOPs to Learn Efficient Sparse Representations" (2020); for SPLADE, Formal et al.,
    "SPLADE v2" (2021). ramp = (step / ramp_steps)^2, at most 1. step: number of finished optimizer steps. The square
    makes it a value of a step's texts together: that of parts, added up, would be another.
    """
    ramp = min(1.0, step / weights.ramp_steps) ** 2 if weights.ramp_steps else 1.0
    omega = weights.lambda_query * queries.square_of_means() + weights.lambda_document * documents.square_of_means()
    return ramp * omega
