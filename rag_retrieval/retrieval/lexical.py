"""The exact search by lexical weights, over the inverted lists of an index."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

import numpy as np

from rag_retrieval.models.representations import LEXICAL
from rag_retrieval.retrieval.candidates import Candidates, best_rows
from rag_retrieval.retrieval.encoding import Encoded, Represent
from rag_retrieval.retrieval.inverted_lists import InvertedLists, Weights


class LexicalSearch:
    """Candidates by the sum over common terms of w_q w_d; documents without a common term are not found.

    shards: folders of an index. represent: queries, as the index's model does. Scores are computed for all documents
    at once: 4 bytes a document.
    """

    words = ""

    def __init__(self, shards: Sequence[Path], represent: Represent | None):
        self.lists = [InvertedLists(shard, LEXICAL, has_weights=True) for shard in shards]
        self.represent = represent
        self._starts = np.cumsum([0, *(len(lists.counts) for lists in self.lists)])
        self._by_document = lru_cache(maxsize=1)(lambda shard: list(self.lists[shard].by_document().texts()))

    @property
    def entries(self) -> int:
        return sum(len(lists.documents) for lists in self.lists)

    def search(self, queries: Sequence[str], judged: Sequence[np.ndarray], depth: int) -> list[Candidates]:
        return self.search_encoded(self.represent(list(queries)), judged, depth)

    def search_encoded(
        self, queries: Encoded, judged: Sequence[np.ndarray], depth: int, among: np.ndarray | None = None
    ) -> list[Candidates]:
        return self.search_weights(queries.lexical, judged, depth, among)

    def search_weights(
        self, queries: Weights, judged: Sequence[np.ndarray], depth: int, among: np.ndarray | None = None
    ) -> list[Candidates]:
        found = []
        for (ids, weights), asked in zip(queries.texts(), judged, strict=True):
            scores = self.scores(ids, weights)
            rows = best_rows(scores, depth, among)
            found.append(Candidates(rows, scores[rows], scores[asked]))
        return found

    def search_documents(self, rows: np.ndarray, depth: int) -> list[Candidates]:
        """`search` with documents as queries."""
        return self.search_weights(self.rows(rows), [np.zeros(0, np.int64)] * len(rows), depth)

    def similarity_of_first(self, given: Weights) -> float:
        """The cosine of the first document's weights and those given for it; 1 where neither has any."""
        stored = self.rows(np.zeros(1, np.int64))
        kept, new = (dict(zip(each.ids.tolist(), each.weights.tolist(), strict=True)) for each in (stored, given))
        length = np.linalg.norm(stored.weights) * np.linalg.norm(given.weights)
        product = sum(weight * new.get(term, 0) for term, weight in kept.items())
        return float(product / length) if length else float(not any(kept.values()) and not any(new.values()))

    def scores(self, ids: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Of every document: float32 [documents]."""
        scores = np.zeros(self._starts[-1], np.float32)
        for start, end, lists in zip(self._starts, self._starts[1:], self.lists, strict=False):
            of_shard = scores[start:end]
            for place, found in lists.find(ids):
                of_shard[lists.documents[found]] += weights[place] * lists.weights[found]  # a document has a term once
        return scores

    def rows(self, rows: np.ndarray) -> Weights:
        """The weights of documents, in the order of `rows`; quick where rows of one shard stand together."""
        shards = np.searchsorted(self._starts, rows, side="right") - 1
        places = rows - self._starts[shards]
        texts = [self._by_document(shard)[place] for shard, place in zip(shards.tolist(), places.tolist(), strict=True)]
        ids = np.concatenate([np.zeros(0, np.int64), *(ids for ids, _ in texts)])
        weights = np.concatenate([np.zeros(0, np.float32), *(weights for _, weights in texts)])
        return Weights(ids, weights, np.array([len(ids) for ids, _ in texts], np.int64))
