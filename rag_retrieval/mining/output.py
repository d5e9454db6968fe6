"""Mined queries as lines of the trainer's three formats, and the summary of a run.

`pos_scores` and `neg_scores` are labels to the trainer, so candidates' scores go there only with
`labels: score`. Otherwise they stand beside the record, as `candidate_scores` or `score`, which the trainer
does not read (with `train_label_key: score` it does, in the formats hits and pointwise).
"""

import gzip
import io
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TextIO

from rag_retrieval.data.corpus import Corpus
from rag_retrieval.mining.queries import Query

REASONS = {
    "before_window": "ranked before first_rank",
    "positive": "a positive of the query",
    "identical_id": "the document with the id of the query",
    "positive_text": "the text of a positive",
    "query_text": "the text of the query",
    "no_text": "no text",
    "repeated_text": "the text of a better candidate",
    "margin": "score too near to the lowest positive's, or above",
    "max_score": "score above max_score",
    "not_drawn": "fit, but not needed",
}


@dataclass(frozen=True)
class Mined:
    """What one query got. negatives: rows of the corpus; scores: those that decided, in the order of the rows.

    dropped: candidates by reason; candidates: how many there were.
    """

    negatives: list[int]
    negative_scores: list[float]
    positive_scores: list[float]
    candidates: int
    dropped: dict[str, int]


def lines_of(query: Query, mined: Mined, corpus: Corpus, output_format: str, labels: str) -> Iterator[str]:
    """Lines without their newline: one for each pair in the format pointwise, else one."""
    positives = [corpus.text(row) for row in query.positives]
    negatives = [corpus.text(row) for row in mined.negatives]
    if output_format == "pos_neg":
        yield _json(_pos_neg(query.text, positives, negatives, mined, labels))
        return
    scores = [*mined.positive_scores, *mined.negative_scores]
    taught = scores if labels == "score" else [*query.labels, *[0.0] * len(negatives)]
    documents = [
        {"content": content, "label": _number(label), "score": score}
        for content, label, score in zip(positives + negatives, taught, scores, strict=True)
    ]
    if output_format == "hits":
        yield _json({"query": query.text, "hits": documents})
    else:
        yield from (_json({"query": query.text, **document}) for document in documents)


def _pos_neg(query: str, positives: list[str], negatives: list[str], mined: Mined, labels: str) -> dict:
    record = {"query": query, "pos": positives, "neg": negatives}
    if labels == "score":
        return record | {"pos_scores": mined.positive_scores, "neg_scores": mined.negative_scores}
    return record | {"candidate_scores": {"pos": mined.positive_scores, "neg": mined.negative_scores}}


def _number(value: float) -> float | int:
    return int(value) if value == int(value) else round(value, 6)


def _json(record: dict) -> str:
    return json.dumps(record, ensure_ascii=False)


@contextmanager
def text_writer(path: Path, compressed: bool) -> Iterator[TextIO]:
    """UTF-8 with line feeds. Compressed without name and time, so that the same lines give the same bytes."""
    with path.open("wb") as file:
        binary = gzip.GzipFile("", "wb", fileobj=file, mtime=0) if compressed else file
        with io.TextIOWrapper(binary, encoding="utf-8", newline="\n") as text:
            yield text


@dataclass
class MiningSummary:
    """What a run kept and dropped. Every candidate is kept, or dropped for one reason: `kept` and all of `dropped` add
    up to `candidates`.

    documents: of the corpus. queries_read: of the source; queries_without_text: blank ones, left out; queries:
    the distinct others; positives: theirs.

    short_queries: written with fewer negatives than asked for; empty_queries: not written, none was found.
    candidates: fetched; kept: negatives; dropped: the others by reason. lines: of the output.
    words: how BM25's words were made, "" for vectors alone.
    """

    documents: int
    queries_read: int
    queries_without_text: int
    queries: int
    positives: int
    short_queries: int = 0
    empty_queries: int = 0
    candidates: int = 0
    kept: int = 0
    dropped: Counter = field(default_factory=Counter)
    lines: int = 0
    words: str = ""

    def add(self, mined: Mined, wanted: int) -> None:
        count = len(mined.negatives)
        self.short_queries += 0 < count < wanted
        self.empty_queries += not count
        self.candidates += mined.candidates
        self.kept += count
        self.dropped.update(mined.dropped)

    def to_dict(self) -> dict:
        return asdict(self) | {"dropped": {reason: self.dropped[reason] for reason in REASONS}}

    def describe(self, wanted: int) -> str:
        """Some lines for a terminal; reasons that dropped nothing are left out."""
        repeated = self.queries_read - self.queries_without_text - self.queries
        merged = f" ({repeated:,} repeated and merged)" if repeated else ""
        rows = [
            (self.queries, f"queries with {self.positives:,} positives" + merged),
            (self.queries_without_text, "without text, left out"),
            (self.queries - self.short_queries - self.empty_queries, f"have {wanted} negatives"),
            (self.short_queries, "have fewer, and are written all the same"),
            (self.empty_queries, "have none, and are not written"),
            (self.candidates, f"candidates from {self.documents:,} documents"),
            (self.kept, "kept as negatives"),
            *((self.dropped[reason], f"dropped: {text}") for reason, text in REASONS.items()),
        ]
        shown = [(count, text) for place, (count, text) in enumerate(rows) if count or not place]
        width = max(len(f"{count:,}") for count, _ in shown)
        lines = [f"  {count:>{width},}  {text}" for count, text in shown]
        return "\n".join(lines + [f"  distinct words: {self.words}"] * bool(self.words))
