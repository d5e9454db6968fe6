"""What a search finds for a query, and what a search is."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np


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


def best_rows(scores: np.ndarray, depth: int, among: np.ndarray | None = None) -> np.ndarray:
    """The rows of the `depth` highest scores above 0, best first, equal scores by row: int64, at most `depth`. among:
    the rows that count; None for all."""
    rows = np.flatnonzero(scores > 0) if among is None else among[scores[among] > 0]
    if len(rows) > depth:
        kept = scores[rows]
        rows = rows[kept >= np.partition(kept, -depth)[-depth]]
    return rows[np.lexsort((rows, -scores[rows]))][:depth]


def part_found(queries: np.ndarray, nearest: Sequence[np.ndarray], found: Sequence[np.ndarray]) -> float:
    """The part of the nearest documents that a search finds, with documents as queries, which do not count themselves;
    1 where there are no others. queries: rows. nearest, found: rows for each query."""
    num_found = num_nearest = 0
    for row, best, rows in zip(queries.tolist(), nearest, found, strict=True):
        others = set(best.tolist()) - {row}
        num_found += len(others.intersection(rows.tolist()))
        num_nearest += len(others)
    return num_found / num_nearest if num_nearest else 1.0


class Search(Protocol):
    """A search over a corpus. words: how BM25's words were made (`describe_words`), "" where none were counted."""

    words: str

    def search(self, queries: Sequence[str], judged: Sequence[np.ndarray], depth: int) -> list[Candidates]:
        """The best `depth` documents of each query. judged: for each query int64 rows to score besides."""
