"""What a teacher said, in a few lines: its scores by label, and how often it puts a higher label first.

What a reader would get wrong: the last figure is over all pairs of documents with different labels, whatever their
query; nothing is ranked.
"""

from array import array
from collections.abc import Iterable
from dataclasses import dataclass, field

import numpy as np

MOST_LEVELS = 8  # labels with more levels than that are shown as above and not above their middle
PERCENTILES = (5, 25, 50, 75, 95)


@dataclass
class ScoreSummary:
    """records: of the output. labels, scores: of each pair, in its order."""

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

    groups: scores of each level, in rising order of labels; at least two, none empty.
    """
    right = total = 0.0
    for place, higher in enumerate(groups):
        for lower in groups[:place]:
            lower = np.sort(lower)
            below, up_to = (np.searchsorted(lower, higher, side) for side in ("left", "right"))
            right += (below + up_to).sum() / 2
            total += len(lower) * len(higher)
    return right / total
