"""The token vectors of a step's texts, as leaves of autograd: MaxSim, s(q, d) = sum_i max_j <q_i, d_j>.

Khattab and Zaharia, "ColBERT" (2020). Texts lie one after another without padding. Products of tokens exist for some
documents at a time alone. For the backward pass it is kept which token of a document is the nearest, a number for each
query token and document, so that the gradient takes no product of matrices.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from rag_retrieval.losses.step_outputs import Ragged
from rag_retrieval.losses.step_vectors import ALL, Places

CHUNK_ELEMENTS = 1 << 22  # of the products of tokens that exist at once: 16 MB in float32


class StepTokens:
    """vectors: float32 [tokens, width], text after text. counts: int64 [texts]. mean: the sum is divided by the number
    of the query's vectors. A text without vectors has the score 0 with every other."""

    def __init__(self, vectors: Tensor, counts: Tensor, mean: bool):
        self.texts, self.mean = Ragged(counts), mean
        self.vectors = vectors.detach().clone(memory_format=torch.contiguous_format).requires_grad_()

    def __len__(self) -> int:
        return len(self.texts)

    def row_elements(self, others: "StepTokens", own: int) -> int:
        """Values that a record of a block adds to its largest matrix. own: number of documents of a record."""
        longest = int(self.texts.counts.max()) if len(self) else 0
        return longest * max(len(self), len(others), own)

    def against(self, places: Places, others: "StepTokens", other_places: Places = ALL) -> list[Tensor]:
        """Scores of the texts at places [n], as queries, with those of others at other_places [m]: [[n, m]]."""
        places, other_places = self.texts.all[places], others.texts.all[other_places]
        rows, tokens = self.texts.entries_of(places)
        found = others._nearest(other_places, self.vectors.detach()[tokens])
        return [self._sum(rows, tokens, len(places), others, *found)]

    def with_own(self, places: Tensor, others: "StepTokens", other_places: Tensor) -> list[Tensor]:
        """Scores of the texts at places [n], as queries, with those of theirs at other_places [n, k]: [[n, k]]."""
        rows, tokens = self.texts.entries_of(places)
        queries = self.vectors.detach()[tokens].split(self.texts.counts[places].tolist())
        found = [others._nearest(own, query) for own, query in zip(other_places, queries, strict=True)]
        maxima, nearest = (torch.cat(each) for each in zip(*found, strict=True))
        return [self._sum(rows, tokens, len(places), others, maxima, nearest)]

    @torch.no_grad()
    def _nearest(self, places: Tensor, queries: Tensor) -> tuple[Tensor, Tensor]:
        """The largest product of each query vector [tokens, width] with one of each text at places [m], and the place
        of that vector: [tokens, m], float32 and int32; 0 and -1 for a text without vectors."""
        maxima = queries.new_zeros(len(queries), len(places))
        nearest = torch.full(maxima.shape, -1, dtype=torch.int32, device=maxima.device)
        counts = self.texts.counts[places]
        order = counts.argsort(descending=True, stable=True)  # neighbours have nearly the same length
        lengths = counts[order].tolist()
        start, end = 0, len(lengths) - lengths.count(0)
        while start < end:
            size = max(1, CHUNK_ELEMENTS // (lengths[start] * max(queries.shape)))
            columns = order[start : min(start + size, end)]
            within = torch.arange(lengths[start], device=counts.device)
            # a shorter text's last vector stands in the places that it lacks, which changes no maximum
            tokens = self.texts.starts[places[columns], None] + within.minimum(counts[columns, None] - 1)
            products = self.vectors.detach()[tokens] @ queries.T
            largest = products.max(dim=1)
            maxima[:, columns] = largest.values.T
            nearest[:, columns] = tokens.gather(1, largest.indices).T.int()
            start += size
        return maxima, nearest

    def _sum(
        self, rows: Tensor, tokens: Tensor, number: int, others: "StepTokens", maxima: Tensor, nearest: Tensor
    ) -> Tensor:
        """[n, columns] from `_nearest` of these tokens of the n texts, whose rows are given."""
        shares = 1 / self.texts.counts[self.texts.texts[tokens]] if self.mean else torch.ones_like(tokens)
        shares = shares.to(maxima.dtype).unsqueeze(1)
        return _SumOfNearest.apply(self.vectors, others.vectors, rows, tokens, shares, maxima, nearest, number)

    def gradient(self) -> Tensor:
        """Of all that was back-propagated, at the vectors: float32 [tokens, width]."""
        return torch.zeros_like(self.vectors) if self.vectors.grad is None else self.vectors.grad


class _SumOfNearest(torch.autograd.Function):
    """out[r, c] = sum over tokens t of row r of share_t * <query vector of t, document vector nearest[t, c]>."""

    @staticmethod
    def forward(
        ctx: Any, queries: Tensor, documents: Tensor, rows: Tensor, tokens: Tensor, shares: Tensor, maxima: Tensor,
        nearest: Tensor, number: int,
    ) -> Tensor:  # fmt: skip
        ctx.save_for_backward(queries, documents, rows, tokens, shares, nearest)
        return maxima.new_zeros(number, maxima.shape[1]).index_add_(0, rows, maxima * shares)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        queries, documents, rows, tokens, shares, nearest = ctx.saved_tensors
        of_queries, of_documents = torch.zeros_like(queries), torch.zeros_like(documents)
        if len(documents) and nearest.numel():
            slopes = (gradient[rows] * shares).masked_fill_(nearest < 0, 0.0)
            nearest = nearest.clamp(min=0)
            sums = F.embedding_bag(nearest, documents, mode="sum", per_sample_weights=slopes)
            of_queries.index_add_(0, tokens, sums)
            ordered, order = nearest.flatten().sort(stable=True)
            firsts = torch.searchsorted(ordered, torch.arange(len(documents), dtype=ordered.dtype, device=order.device))
            of_pair = tokens[order.div(nearest.shape[1], rounding_mode="floor")]
            of_documents = F.embedding_bag(
                of_pair, queries, firsts, mode="sum", per_sample_weights=slopes.flatten()[order]
            )
        return of_queries, of_documents, *[None] * 6
