"""The nearest documents of queries by the inner product of vectors, exactly or approximately.

`DenseSearch` reads the vectors in blocks, so that its memory does not grow with the corpus. int8 and binary vectors are
decoded then, and compared with the query's own float32 numbers: more exact than comparing bits with bits.

The best of an approximate search (FAISS, or coarse vectors beside a finer copy) are scored anew by the finest vectors
that are kept, and so is a judged document, also where it was not found.

Among a part of the documents (`among`) the search stays what it is where they are many. Where they are few they are all
compared, by the finest vectors; and so they are where FAISS finds fewer of them than are asked for, or cannot search
among a part.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rag_retrieval.models.nearest import nearest
from rag_retrieval.retrieval.approximate import search_faiss
from rag_retrieval.retrieval.candidates import Candidates, part_found
from rag_retrieval.retrieval.encoding import Encoded, Represent
from rag_retrieval.retrieval.stored_vectors import Vectors, drawn_rows

if TYPE_CHECKING:
    import torch

RECALL_QUERIES, RECALL_DEPTH = 200, 10
FEW = 50_000  # documents; among fewer, most of the lists that FAISS looks through would hold none of them

Found = tuple[np.ndarray, np.ndarray]  # of a query: rows, best first, and their scores


class DenseSearch:
    """Candidates by inner product. represent: queries, as the index's model does. finer: a copy of the vectors that
    scores the best anew. index: of FAISS. factor: how many are scored anew for each one asked for. Without finer and
    index every document is compared, exactly."""

    words = ""

    def __init__(
        self,
        vectors: Vectors,
        represent: Represent | None,
        device: "str | torch.device",
        finer: Vectors | None = None,
        index=None,
        factor: int = 1,
    ):
        self.vectors, self.represent, self.device, self.index = vectors, represent, device, index
        self.finest, self.factor = finer or vectors, factor
        self.is_exact = index is None and finer is None

    def search(self, queries: Sequence[str], judged: Sequence[np.ndarray], depth: int) -> list[Candidates]:
        return self.search_encoded(self.represent(list(queries)), judged, depth)

    def search_encoded(
        self, queries: Encoded, judged: Sequence[np.ndarray], depth: int, among: np.ndarray | None = None
    ) -> list[Candidates]:
        return self.search_vectors(queries.dense, judged, depth, among)

    def search_vectors(
        self, queries: np.ndarray, judged: Sequence[np.ndarray], depth: int, among: np.ndarray | None = None
    ) -> list[Candidates]:
        """queries: float32 [queries, dim]. among: int64 rows, rising, that may be found; None for all."""
        if self.is_exact or (among is not None and len(among) <= max(FEW, depth * self.factor)):
            found = self._exact(queries, depth, among)
        else:
            found = self._approximate(queries, depth, among)
        return [
            Candidates(rows, scores, self.finest.rows(asked) @ query)
            for query, (rows, scores), asked in zip(queries, found, judged, strict=True)
        ]

    def _exact(self, queries: np.ndarray, depth: int, among: np.ndarray | None) -> list[Found]:
        finest = self.finest
        return list(zip(*nearest(queries, finest.parts, depth, self.device, finest.decode, among), strict=True))

    def _approximate(self, queries: np.ndarray, depth: int, among: np.ndarray | None) -> list[Found]:
        total, best = len(self.vectors) if among is None else len(among), []
        wanted = min(depth * self.factor, total)
        if self.index is None:
            all_rows, _ = nearest(queries, self.vectors.parts, wanted, self.device, self.vectors.decode, among)
        else:
            all_rows = search_faiss(self.index, queries, wanted, among)
        for query, rows in zip(queries, all_rows, strict=True):
            rows = np.sort(rows[rows >= 0])  # FAISS fills up with -1 where it finds fewer
            if among is not None and len(rows) < min(depth, total):
                best += self._exact(query[None], depth, among)
                continue
            scores = self.finest.rows(rows) @ query
            order = np.lexsort((rows, -scores))[:depth]
            best.append((rows[order], scores[order]))
        return best

    def similarity_of_first(self, given: np.ndarray) -> float:
        """The cosine of the first document's vector and the one given for it, float32 [1, dim]."""
        return self.finest.similarity(given, self.finest.rows(np.zeros(1, np.int64)))

    def search_documents(self, rows: np.ndarray, depth: int) -> list[Candidates]:
        """`search` with documents as queries, by the finest vectors that are kept."""
        return self.search_vectors(self.finest.rows(rows), [np.zeros(0, np.int64)] * len(rows), depth)

    def recall(self, seed: int) -> float:
        """The part of the nearest `RECALL_DEPTH` by the finest vectors that the search finds, over documents drawn by
        the seed as queries. A document itself does not count; 1 where there is no other."""
        drawn, depth = drawn_rows(len(self.vectors), RECALL_QUERIES, seed), RECALL_DEPTH + 1
        exact, _ = nearest(self.finest.rows(drawn), self.finest.parts, depth, self.device, self.finest.decode)
        return part_found(drawn, exact, [candidates.rows for candidates in self.search_documents(drawn, depth)])
