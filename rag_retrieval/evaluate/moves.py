"""The queries that gained and lost most between two runs, with the documents whose move made the difference.

The trap: a document that only one run has stands at no rank in the other, shown as "-".
"""

from dataclasses import dataclass

import numpy as np

from rag_retrieval.data.beir import Run
from rag_retrieval.evaluate.ranking_data import RankingData
from rag_retrieval.evaluate.terminal_text import pad, shorten, width
from rag_retrieval.metrics import PerQuery, trec_order

SHOWN_QUERIES = 3  # that gained, and that lost
SHOWN_DOCUMENTS = 4


@dataclass(frozen=True)
class Move:
    """A document's ranks, from 1, in both runs; None where a run does not have it. grade: None unjudged."""

    document: str
    grade: int | None
    before: int | None
    after: int | None


@dataclass(frozen=True)
class QueryChange:
    """The value of one measure for a query before and after, and its documents that moved, by their new rank."""

    query: str
    before: float
    after: float
    moves: list[Move]


def largest_changes(
    data: RankingData, before: PerQuery, after: PerQuery, runs: tuple[Run, Run], measure: str
) -> tuple[list[QueryChange], list[QueryChange]]:
    """(gained most, lost most) by `measure`, at most `SHOWN_QUERIES` each, the largest first.

    runs: before and after. Queries with equal changes keep the order of the data.
    """
    changes = {query: after[measure][query] - value for query, value in before[measure].items()}
    order = sorted(changes, key=lambda query: -changes[query])
    gained = [query for query in order if changes[query] > 1e-12][:SHOWN_QUERIES]
    lost = [query for query in sorted(changes, key=changes.get) if changes[query] < -1e-12][:SHOWN_QUERIES]

    def described(query: str) -> QueryChange:
        moves = moved_documents(data.qrels[query], runs[0].get(query, {}), runs[1].get(query, {}))
        return QueryChange(query, before[measure][query], after[measure][query], moves)

    return [described(query) for query in gained], [described(query) for query in lost]


def moved_documents(grades: dict[str, int], before: dict[str, float], after: dict[str, float]) -> list[Move]:
    """The `SHOWN_DOCUMENTS` whose move changed the list most, by their new rank.

    Weight is the change of the discount 1 / log2(rank + 1), and twice that where a document has a grade above 0:
    those are what a measure counts.
    """
    old, new = ({document: rank for rank, document in enumerate(trec_order(run), start=1)} for run in (before, after))
    moves = [
        Move(document, grades.get(document), old.get(document), new.get(document)) for document in old.keys() | new
    ]
    moved = [move for move in moves if move.before != move.after]
    moved.sort(key=lambda move: (-_weight(move), move.document))
    return sorted(moved[:SHOWN_DOCUMENTS], key=lambda move: (move.after or np.inf, move.document))


def _weight(move: Move) -> float:
    old, new = (0.0 if rank is None else 1 / np.log2(rank + 1) for rank in (move.before, move.after))
    return abs(new - old) * (2 if (move.grade or 0) > 0 else 1)


def describe_changes(
    data: RankingData, changes: tuple[list[QueryChange], list[QueryChange]], measure: str, columns: int
) -> str:
    """Both lists as text of at most `columns` columns, wide characters counted as two."""
    lines = []
    for title, queries in zip(("gained", "lost"), changes, strict=True):
        lines.append(f"\nqueries that {title} most ({measure}):" if queries else f"\nno query {title}")
        for change in queries:
            lines += describe_change(data, change, columns)
    return "\n".join(lines).lstrip("\n")


def describe_change(data: RankingData, change: QueryChange, columns: int) -> list[str]:
    head = f"  {change.after - change.before:+.3f}  "
    lines = [head + shorten(data.queries[change.query], columns - width(head))]
    for move in change.moves:
        grade = "-" if move.grade is None else str(move.grade)
        ranks = f"{_rank(move.before):>4} -> {_rank(move.after):<4}"
        row = pad(f"     grade {grade:<2} rank {ranks}", 31)
        lines.append(row + shorten(data.documents[move.document], columns - len(row)))
    return lines


def _rank(rank: int | None) -> str:
    return "-" if rank is None else str(rank)
