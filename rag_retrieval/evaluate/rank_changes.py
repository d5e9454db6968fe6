"""The queries that gained and lost most between two runs, with the documents whose ranks made the difference."""

from dataclasses import dataclass

import numpy as np

from rag_retrieval.data.beir import Qrels, Run
from rag_retrieval.metrics import PerQuery, trec_order

SHOWN_QUERIES = 3  # that gained, and that lost
SHOWN_DOCUMENTS = 4


@dataclass(frozen=True)
class RankChange:
    """A document's ranks, from 1, in both runs; None where a run does not have it. grade: None unjudged."""

    document: str
    grade: int | None
    before: int | None
    after: int | None

    @property
    def weight(self) -> float:
        """The change of the discount 1 / log2(rank + 1), and twice that where a metric counts the document."""
        old, new = (0.0 if rank is None else 1 / np.log2(rank + 1) for rank in (self.before, self.after))
        return abs(new - old) * (2 if (self.grade or 0) > 0 else 1)

    def as_text(self) -> tuple[str, str]:
        """Grade, and ranks as `3 -> 1`; - where there is none."""
        grade, before, after = ("-" if value is None else str(value) for value in (self.grade, self.before, self.after))
        return grade, f"{before} -> {after}"


@dataclass(frozen=True)
class QueryChange:
    """The value of one metric for a query before and after, and its documents that changed rank, by their new one."""

    query: str
    before: float
    after: float
    documents: list[RankChange]


def largest_changes(
    qrels: Qrels, before: PerQuery, after: PerQuery, runs: tuple[Run, Run], metric: str
) -> tuple[list[QueryChange], list[QueryChange]]:
    """(gained most, lost most) by `metric`, at most `SHOWN_QUERIES` each, the largest first.

    runs: before and after. Queries with equal changes keep the order of the data.
    """
    gains = {query: after[metric][query] - value for query, value in before[metric].items()}
    gained = [query for query in sorted(gains, key=lambda query: -gains[query]) if gains[query] > 1e-12]
    lost = [query for query in sorted(gains, key=gains.get) if gains[query] < -1e-12]

    def change(query: str) -> QueryChange:
        documents = changed_documents(qrels[query], runs[0].get(query, {}), runs[1].get(query, {}))
        return QueryChange(query, before[metric][query], after[metric][query], documents)

    return [change(query) for query in gained[:SHOWN_QUERIES]], [change(query) for query in lost[:SHOWN_QUERIES]]


def changed_documents(grades: dict[str, int], before: dict[str, float], after: dict[str, float]) -> list[RankChange]:
    """The `SHOWN_DOCUMENTS` of most weight that have another rank, by their new rank."""
    old, new = ({document: rank for rank, document in enumerate(trec_order(run), start=1)} for run in (before, after))
    changes = [
        RankChange(document, grades.get(document), old.get(document), new.get(document))
        for document in old.keys() | new
        if old.get(document) != new.get(document)
    ]
    changes.sort(key=lambda change: (-change.weight, change.document))
    return sorted(changes[:SHOWN_DOCUMENTS], key=lambda change: (change.after or np.inf, change.document))
