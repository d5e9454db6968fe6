"""The candidates of one query, in the order of their scores, and two lists of them fused.

The trap: scores of two systems share no scale. After fusion a score is a sum of reciprocal ranks, and the
difference of two such scores says nothing about relevance; a margin is for scores of one system.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

RRF_K = 60  # Cormack, Clarke and Büttcher, SIGIR 2009


@dataclass(frozen=True)
class Candidates:
    """rows: int64 [candidates], documents of the corpus, best first, each once; scores: float32, of the same
    length, not ascending. positive_scores: float32, those of the query's positives, candidates or not."""

    rows: np.ndarray
    scores: np.ndarray
    positive_scores: np.ndarray

    @classmethod
    def none(cls, num_positives: int) -> "Candidates":
        nothing = np.zeros(0, np.float32)
        return cls(nothing.astype(np.int64), nothing, np.zeros(num_positives, np.float32))


def best_rows(scores: np.ndarray, depth: int) -> np.ndarray:
    """int64: rows of the `depth` highest scores above 0, best first, equal ones by row. Fewer where there are."""
    rows = np.flatnonzero(scores > 0)
    if len(rows) > depth:
        kept = scores[rows]
        rows = rows[kept >= np.partition(kept, -depth)[-depth]]
    return rows[np.lexsort((rows, -scores[rows]))][:depth]


def fuse(lists: Sequence[Candidates], positives: np.ndarray, depth: int) -> Candidates:
    """Reciprocal rank fusion: the score of a document is the sum of 1 / (60 + rank) over the lists that have it,
    ranks from 1. The best `depth`, equal ones by row. A positive in no list has the score 0.
    """
    rows = np.concatenate([found.rows for found in lists])
    shares = np.concatenate([1 / (RRF_K + 1 + np.arange(len(found.rows))) for found in lists])
    documents, place = np.unique(rows, return_inverse=True)
    scores = np.bincount(place, shares, len(documents)).astype(np.float32)
    of_positives = np.array([scores[documents == row].sum() for row in positives], np.float32)
    order = best_rows(scores, depth)
    return Candidates(documents[order], scores[order], of_positives)
