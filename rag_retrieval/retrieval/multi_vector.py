"""The search by token vectors: candidates, then exact MaxSim of their stored vectors (`token_vectors`).

Candidates come from another search of the index, from the centroids nearest to each token of the query (as in PLAID,
https://arxiv.org/abs/2205.09707), or are all documents, which is exact and reads every vector.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rag_retrieval.retrieval.candidates import Candidates, part_found
from rag_retrieval.retrieval.dense import DenseSearch
from rag_retrieval.retrieval.encoding import Encoded, Represent
from rag_retrieval.retrieval.inverted_lists import InvertedLists
from rag_retrieval.retrieval.lexical import LexicalSearch
from rag_retrieval.retrieval.stored_vectors import drawn_rows
from rag_retrieval.retrieval.token_vectors import (
    MEASURED_DEPTH,
    MEASURED_QUERIES,
    MEASURED_TOKENS,
    TOKEN_LISTS,
    StoredTokens,
    TokenVectors,
    best_of,
    best_of_all,
    maxsim_of_rows,
)

if TYPE_CHECKING:
    import torch

PROBES = 8  # centroids of a token of a query


class CentroidSearch:
    """Documents that have tokens near those of a query: a document gets of each token of the query the largest product
    with one of its `PROBES` nearest centroids that the document has a token at, else 0.

    centroids: float32 [centroids, width]. shards: folders of an index.
    """

    def __init__(self, centroids: np.ndarray, shards: Sequence[Path]):
        self.centroids = centroids
        self.lists = [InvertedLists(shard, TOKEN_LISTS, has_weights=False) for shard in shards]

    def search(self, query: np.ndarray, depth: int, among: np.ndarray | None = None) -> np.ndarray:
        """The rows of the best `depth` for the token vectors of one query, float32 [tokens, width]; fewer where fewer
        are found. among: int64 rows, rising, that may be found; None for all."""
        products = query @ self.centroids.T
        probed = np.argsort(-products, axis=1, kind="stable")[:, :PROBES]
        first, all_rows, all_scores = 0, [], []
        for lists in self.lists:
            scores, is_found = self._scores(lists, products, probed)
            rows = np.flatnonzero(is_found)
            all_rows.append(rows + first)
            all_scores.append(scores[rows])
            first += len(scores)
        rows, scores = np.concatenate(all_rows), np.concatenate(all_scores)
        if among is not None:
            kept = np.isin(rows, among, assume_unique=True)
            rows, scores = rows[kept], scores[kept]
        return best_of(rows, scores, depth)[0]

    @staticmethod
    def _scores(lists: InvertedLists, products: np.ndarray, probed: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(score, whether it has a token at any of the centroids) of each document of a shard."""
        places = dict(lists.find(probed.ravel()))
        scores, best = (np.zeros(len(lists.counts), np.float32) for _ in range(2))
        is_found = np.zeros(len(scores), bool)
        for token, centroids in enumerate(probed):
            for place in reversed(range(len(centroids))):  # the nearest last, so that its product stays
                found = places.get(token * len(centroids) + place)
                if found is not None:
                    best[lists.documents[found]] = products[token, centroids[place]]
                    is_found[lists.documents[found]] = True
            scores += best
            best[:] = 0
        return scores, is_found


class MultiVectorSearch:
    """Candidates, then the best of them by MaxSim of the vectors that are kept; so are judged documents scored.

    represent: queries, as the index's model does. first: where candidates come from; None: all documents are scored.
    factor: candidates for each document that is asked for.

    Among a part of the documents (`among`) all of them are scored where they are no more than the candidates would be,
    or where fewer candidates are found than are asked for.
    """

    words = ""

    def __init__(
        self,
        documents: StoredTokens,
        represent: Represent | None,
        device: "str | torch.device",
        first: DenseSearch | LexicalSearch | CentroidSearch | None = None,
        factor: int = 1,
    ):
        self.documents, self.represent, self.device = documents, represent, device
        self.first, self.factor, self.is_exact = first, factor, first is None

    def search(self, queries: Sequence[str], judged: Sequence[np.ndarray], depth: int) -> list[Candidates]:
        return self.search_encoded(self.represent(list(queries)), judged, depth)

    def search_encoded(
        self, queries: Encoded, judged: Sequence[np.ndarray], depth: int, among: np.ndarray | None = None
    ) -> list[Candidates]:
        tokens, wanted = queries.multi_vector, depth * self.factor
        if self.first is None or (among is not None and len(among) <= wanted):
            return self._search_all(tokens, judged, depth, among)
        if isinstance(self.first, CentroidSearch):
            return self.search_vectors(tokens, judged, depth, among)
        found = self.first.search_encoded(queries, [np.zeros(0, np.int64)] * len(judged), wanted, among)
        return self._score(tokens, [candidates.rows for candidates in found], judged, depth, among)

    def search_vectors(
        self, queries: TokenVectors, judged: Sequence[np.ndarray], depth: int, among: np.ndarray | None = None
    ) -> list[Candidates]:
        """Where candidates come from no other search of the index."""
        if self.first is None:
            return self._search_all(queries, judged, depth, among)
        rows = [self.first.search(query, depth * self.factor, among) for query in queries.texts()]
        return self._score(queries, rows, judged, depth, among)

    def _search_all(
        self, queries: TokenVectors, judged: Sequence[np.ndarray], depth: int, among: np.ndarray | None
    ) -> list[Candidates]:
        best = best_of_all(queries, self.documents, depth, self.device, among)
        asked = zip(queries.texts(), best, judged, strict=True)
        return [Candidates(*found, self._scores_of(query, rows)) for query, found, rows in asked]

    def _score(
        self,
        queries: TokenVectors,
        candidates: Sequence[np.ndarray],
        judged: Sequence[np.ndarray],
        depth: int,
        among: np.ndarray | None = None,
    ) -> list[Candidates]:
        """candidates: rows for each query."""
        found = []
        for query, rows, asked in zip(queries.texts(), candidates, judged, strict=True):
            if among is not None and len(rows) < min(depth, len(among)):
                rows = among
            best = best_of(rows, self._scores_of(query, rows), depth)
            found.append(Candidates(*best, self._scores_of(query, asked)))
        return found

    def _scores_of(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        return maxsim_of_rows(query, self.documents, rows, self.device)

    def similarity_of_first(self, given: TokenVectors) -> float:
        """The mean cosine of the vectors of the first document and those given for it; 0 for another number of them."""
        stored = self.documents.rows(np.zeros(1, np.int64)).vectors
        return self.documents.vectors.similarity(given.vectors, stored) if len(stored) == len(given.vectors) else 0.0

    def recall(self, seed: int) -> float:
        """The part of the best `MEASURED_DEPTH` of all documents, by the vectors that are kept, that the search finds:
        over documents drawn by the seed, whose first `MEASURED_TOKENS` tokens are the queries. A document itself does
        not count; 1 where there is no other."""
        drawn = drawn_rows(len(self.documents), MEASURED_QUERIES, seed)
        queries = TokenVectors.of([text[:MEASURED_TOKENS] for text in self.documents.rows(drawn).texts()])
        depth, none = MEASURED_DEPTH + 1, [np.zeros(0, np.int64)] * len(drawn)
        nearest = [rows for rows, _ in best_of_all(queries, self.documents, depth, self.device)]
        if self.first is None or isinstance(self.first, CentroidSearch):
            found = self.search_vectors(queries, none, depth)
        else:
            rows = [candidates.rows for candidates in self.first.search_documents(drawn, depth * self.factor)]
            found = self._score(queries, rows, none, depth)
        return part_found(drawn, nearest, [candidates.rows for candidates in found])
