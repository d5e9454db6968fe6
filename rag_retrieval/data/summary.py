"""What a store holds, in numbers and as text: counts, sizes of the groups, and a histogram of the labels.

The counts are taken when the store is built and kept in its `meta.json`; nothing here reads the pairs again. A single
document counts as a group with all labels equal: every group of an ungrouped pointwise file does, and `format_summary`
leaves groups out there.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

CHUNK = 1 << 13  # labels handled at once
MAX_LEVELS = 11  # the scale 0 to 10 is drawn level by level, more distinct labels as ten bins


@dataclass(frozen=True)
class StoreSummary:
    """Counts of a store. records: lines or rows of the source; queries: distinct ones.

    repeated_pairs: pairs whose query and document appeared before. empty_documents: empty or only blanks.
    equal_label_groups: groups, single documents included, that teach a pairwise loss nothing.
    label_histogram: (lowest, highest, pairs) for each level (lowest == highest), or for each of ten bins.
    """

    records: int
    groups: int
    pairs: int
    queries: int
    repeated_pairs: int
    empty_documents: int
    equal_label_groups: int
    smallest_group: int
    largest_group: int
    label_histogram: list[tuple[float, float, int]]


def summary(store) -> StoreSummary:
    """The counts of a `RecordStore` (not imported here: writing a store needs this file)."""
    values = store.meta["summary"]
    return StoreSummary(**values | {"label_histogram": [tuple(bar) for bar in values["label_histogram"]]})


def label_histogram(labels: np.ndarray) -> list[tuple[float, float, int]]:
    """The histogram of a `StoreSummary`. labels: float32 [pairs], not empty."""
    chunks = [slice(begin, begin + CHUNK) for begin in range(0, len(labels), CHUNK)]
    levels = np.empty(0, np.float32)
    for chunk in chunks:
        levels = np.union1d(levels, labels[chunk])
        if len(levels) > MAX_LEVELS:
            break
    else:
        counts = sum((labels[chunk][:, None] == levels).sum(axis=0) for chunk in chunks)
        return [(float(level), float(level), int(count)) for level, count in zip(levels, counts, strict=True)]
    low, high = float(labels.min()), float(labels.max())
    edges = np.linspace(low, high, 11)
    counts = sum(np.histogram(labels[chunk].astype(float), edges)[0] for chunk in chunks)
    return [(float(a), float(b), int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]


class TokenLengths(NamedTuple):
    """unit: what is counted, such as "pair". lengths: int [texts], tokens before truncation. limit: tokens; longer
    texts are counted as truncated. sampled: the texts are a sample."""

    unit: str
    lengths: np.ndarray
    limit: int
    sampled: bool = False


def format_summary(counts: StoreSummary, name: str, lengths: Sequence[TokenLengths] = ()) -> str:
    """The summary as text of at most 80 columns (but for a longer name), without a final newline.

    name: the first line, for example the path of the source.
    """
    rows = [("records", f"{counts.records:,}"), ("pairs", f"{counts.pairs:,}")]
    rows.append(("queries", f"{counts.queries:,} distinct"))
    if counts.largest_group > 1:
        sizes = f"{counts.smallest_group:,} to {counts.largest_group:,} documents"
        rows.append(("groups", f"{counts.groups:,} of {sizes}"))
        rows.append(("", f"{counts.equal_label_groups:,} of them with all labels equal"))
    rows.append(("repeated pairs", f"{counts.repeated_pairs:,} (same query and document)"))
    rows.append(("empty documents", f"{counts.empty_documents:,}"))
    for each in lengths:
        rows += _token_rows(*each)
    lines = [name, *(f"  {title:<20}{value}" for title, value in rows), "  labels"]
    return "\n".join(lines + _bars(counts.label_histogram))


def _token_rows(unit: str, lengths: np.ndarray, limit: int, sampled: bool) -> list[tuple[str, str]]:
    p50, p95, p99 = np.percentile(lengths, [50, 95, 99], method="higher").tolist()
    rows = [(f"tokens per {unit}", f"p50 {p50:,}, p95 {p95:,}, p99 {p99:,}, max {lengths.max():,}")]
    count, plural = int((lengths > limit).sum()), unit.replace("query", "querie") + "s"
    rows.append(("truncated", f"{count:,} {plural} ({count / len(lengths):.1%}) at {limit:,} tokens"))
    if sampled:
        rows.append(("", f"(tokens counted on a sample of {len(lengths):,} {plural})"))
    return rows


def _bars(histogram: list[tuple[float, float, int]], width: int = 30) -> list[str]:
    """One line for each level or bin; a bar's length is its share of the largest, at least 1 if not empty."""
    total, largest = sum(count for *_, count in histogram), max(count for *_, count in histogram)
    lines = []
    for low, high, count in histogram:
        name = f"{low:.4g}" if low == high else f"{low:.3g} to {high:.3g}"
        bar = "█" * max(round(width * count / largest), count > 0)
        lines.append(f"  {name:>20}  {count:>12,}  {count / total:>6.1%}  {bar}".rstrip())
    return lines
