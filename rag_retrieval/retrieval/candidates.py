"""Search results of one query, and reciprocal rank fusion of the results of several searches.

Scores of two searches share no scale. After fusion a score is a sum of reciprocal ranks, so a difference of two such
scores says nothing about relevance.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np

RRF_K = 60  # Cormack, Clarke and Büttcher, SIGIR 2009


@dataclass(frozen=True)
class Candidates:
    """What a search found for one query.

    rows: int64 [candidates], documents of the corpus, best first, each once. scores: float32 [candidates], descending.
    judged_scores: float32, the scores of the documents that the caller asked for besides, found or not.
    """

    rows: np.ndarray
    scores: np.ndarray
    judged_scores: np.ndarray

    @classmethod
    def none(cls, num_judged: int) -> "Candidates":
        nothing = np.zeros(0, np.float32)
        return cls(nothing.astype(np.int64), nothing, np.zeros(num_judged, np.float32))


def best_rows(scores: np.ndarray, depth: int) -> np.ndarray:
    """The rows of the `depth` highest scores above 0, best first, equal scores by row: int64, at most `depth`."""
    rows = np.flatnonzero(scores > 0)
    if len(rows) > depth:
        kept = scores[rows]
        rows = rows[kept >= np.partition(kept, -depth)[-depth]]
    return rows[np.lexsort((rows, -scores[rows]))][:depth]


def fuse(lists: Sequence[Candidates], judged: np.ndarray, depth: int) -> Candidates:
    """Reciprocal rank fusion: the score of a document is the sum of 1 / (60 + rank) over the lists that have it,
    ranks from 1. The best `depth`, equal scores by row. A judged document in no list has the score 0.
    """
    rows = np.concatenate([candidates.rows for candidates in lists])
    shares = np.concatenate([1 / (RRF_K + 1 + np.arange(len(candidates.rows))) for candidates in lists])
    documents, place = np.unique(rows, return_inverse=True)
    scores = np.bincount(place, shares, len(documents)).astype(np.float32)
    judged_scores = np.array([scores[documents == row].sum() for row in judged], np.float32)
    order = best_rows(scores, depth)
    return Candidates(documents[order], scores[order], judged_scores)


class Search(Protocol):
    """A search over a corpus. words: how BM25's words were made (`describe_words`), "" where none were counted."""

    words: str

    def search(self, queries: Sequence[str], judged: Sequence[np.ndarray], depth: int) -> list[Candidates]:
        """The best `depth` documents of each query. judged: for each query int64 rows to score besides."""


class FusedSearch:
    """Every search to the full depth, then fused."""

    def __init__(self, searches: Sequence[Search]):
        self.searches = searches
        self.words = "".join(search.words for search in searches)

    def search(self, queries: Sequence[str], judged: Sequence[np.ndarray], depth: int) -> list[Candidates]:
        lists = zip(*(search.search(queries, judged, depth) for search in self.searches), strict=True)
        return [fuse(of_query, rows, depth) for of_query, rows in zip(lists, judged, strict=True)]
