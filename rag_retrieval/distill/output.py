"""Records with a teacher's scores as lines of a training file, and a summary of the scores.

Pointwise records stay so, all others become hits:

    {"query": "q", "content": "d", "label": 1, "teacher_score": 6.25, "teacher_probability": 0.99807}
    {"query": "q", "hits": [{"content": "d", "label": 1, "teacher_score": 6.25, "teacher_probability": 0.99807}, ...]}

Numbers are written as the shortest text that gives the same float32, so that a file read back has the
scores to the last bit and not a digit more.
"""

import json
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from rag_retrieval.data.records import Record

MOST_LEVELS = 8  # labels with more levels than that are shown as above and not above their middle
PERCENTILES = (5, 25, 50, 75, 95)


def scored_line(record: Record, scores: Sequence[float]) -> str:
    """One JSON line, with its line break. scores: of the record's documents, float32."""
    documents = [
        {"content": document, "label": shortest(label)} | teacher_fields(score)
        for document, label, score in zip(record.documents, record.labels, scores, strict=True)
    ]
    if record.format == "pointwise":
        values = {"query": record.query} | documents[0]
    else:
        values = {"query": record.query, "hits": documents}
    return json.dumps(values, ensure_ascii=False) + "\n"


def teacher_fields(score: float) -> dict[str, float]:
    probability = 1 / (1 + np.exp(-np.float64(score)))
    return {"teacher_score": float(str(np.float32(score))), "teacher_probability": float(str(np.float32(probability)))}


def shortest(label: float) -> int | float:
    """1 for 1.0, 0.3 for the float32 that is nearest to it."""
    return int(label) if label.is_integer() else float(str(np.float32(label)))


@dataclass
class ScoreSummary:
    """What a teacher said, by label. records: of the output. labels, scores: of each pair, in its order."""

    records: int = 0
    labels: array = field(default_factory=lambda: array("f"))
    scores: array = field(default_factory=lambda: array("f"))

    def add(self, documents: Iterable[dict]) -> None:
        self.records += 1
        for document in documents:
            self.labels.append(document["label"])
            self.scores.append(document["teacher_score"])

    @property
    def pairs(self) -> int:
        return len(self.scores)

    def by_label(self) -> dict[str, np.ndarray]:
        """Name of a level of labels, in rising order, to the scores of its pairs: float32."""
        labels, scores = np.array(self.labels), np.array(self.scores)
        levels = np.unique(labels)
        if len(levels) <= MOST_LEVELS:
            return {f"label {level:.4g}": scores[labels == level] for level in levels}
        middle = (levels[0] + levels[-1]) / 2
        names = (f"label up to {middle:.4g}", f"label above {middle:.4g}")
        return {name: scores[(labels > middle) == above] for name, above in zip(names, (False, True), strict=True)}

    def describe(self) -> str:
        title = "  teacher_score" + " " * 9 + "pairs     mean" + "".join(f"{f'p{p}':>9}" for p in PERCENTILES)
        rows = [f"{self.records:,} records, {self.pairs:,} pairs", title + "   probability"]
        groups = self.by_label()
        for name, scores in groups.items():
            values = "".join(f"{value:9.2f}" for value in np.percentile(scores, PERCENTILES))
            probability = np.mean(1 / (1 + np.exp(-scores.astype(np.float64))))
            rows.append(f"  {name:<15}{len(scores):>12,}{scores.mean():9.2f}{values}{probability:14.3f}")
        if len(groups) > 1:
            share = right_order(list(groups.values()))
            rows.append(f"  of a pair with a higher label and one with a lower, the higher scores more in {share:.1%}")
        return "\n".join(rows)


def right_order(groups: list[np.ndarray]) -> float:
    """The share of (lower, higher) pairs in which the higher has the larger score, ties counted half.

    Pairs are of any two documents, whatever their query. groups: scores of each level, in rising order of labels; at
    least two, none empty.
    """
    right = total = 0.0
    for place, higher in enumerate(groups):
        for lower in groups[:place]:
            lower = np.sort(lower)
            below, up_to = (np.searchsorted(lower, higher, side) for side in ("left", "right"))
            right += (below + up_to).sum() / 2
            total += len(lower) * len(higher)
    return right / total
