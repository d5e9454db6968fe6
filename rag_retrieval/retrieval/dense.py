"""The nearest documents of queries by the inner product of vectors, exactly or approximately.

`DenseSearch` reads the vectors in blocks, so that its memory does not grow with the corpus. int8 and binary vectors are
decoded then, and compared with the query's own float32 numbers: more exact than comparing bits with bits.

The best of an approximate search (FAISS, or coarse vectors beside a finer copy) are scored anew by the finest vectors
that are kept, and so is a judged document, also where it was not found.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from rag_retrieval.models.nearest import nearest
from rag_retrieval.retrieval.candidates import Candidates, part_found
from rag_retrieval.retrieval.encoding import Encode
from rag_retrieval.retrieval.stored_vectors import Vectors, drawn_rows

if TYPE_CHECKING:
    import torch

RECALL_QUERIES, RECALL_DEPTH = 200, 10


class DenseSearch:
    """Candidates by inner product. encode: queries to vectors. finer: a copy of the vectors that scores the best
    anew. index: of FAISS. factor: how many are scored anew for each one asked for. Without finer and index every
    document is compared, exactly."""

    words = ""

    def __init__(
        self,
        vectors: Vectors,
        encode: Encode,
        device: "str | torch.device",
        finer: Vectors | None = None,
        index=None,
        factor: int = 1,
    ):
        self.vectors, self.encode, self.device, self.index = vectors, encode, device, index
        self.finest, self.factor = finer or vectors, factor
        self.is_exact = index is None and finer is None

    def search(self, queries: Sequence[str], judged: Sequence[np.ndarray], depth: int) -> list[Candidates]:
        return self.search_vectors(self.encode(list(queries)), judged, depth)

    def search_vectors(self, queries: np.ndarray, judged: Sequence[np.ndarray], depth: int) -> list[Candidates]:
        """queries: float32 [queries, dim]."""
        wanted = min(depth if self.is_exact else depth * self.factor, len(self.vectors))
        if self.index is None:
            rows, scores = nearest(queries, self.vectors.parts, wanted, self.device, self.vectors.decode)
        else:
            scores, rows = self.index.search(np.ascontiguousarray(queries, np.float32), wanted)
        lists = []
        for query, found, found_scores, asked in zip(queries, rows, scores, judged, strict=True):
            if not self.is_exact:
                found = np.sort(found[found >= 0])  # FAISS fills up with -1 where it finds fewer
                found_scores = self.finest.rows(found) @ query
                order = np.lexsort((found, -found_scores))[:depth]
                found, found_scores = found[order], found_scores[order]
            lists.append(Candidates(found, found_scores, self.finest.rows(asked) @ query))
        return lists

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
