"""Queries with their positives as rows of the corpus, from a folder in BEIR layout or from a record file.

A query may be there twice, under two ids or in two records, each time with another positive. They are merged, else the
positive of one would be mined as a negative of the other. Queries are sorted by their text, so that nothing later
depends on the order of the source.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rag_retrieval.data.beir import find_file, find_qrels, judgments, query_texts
from rag_retrieval.data.corpus import Corpus
from rag_retrieval.data.records import BadLines
from rag_retrieval.data.store import open_store


@dataclass(frozen=True)
class Query:
    """positives: int64 rows of the corpus, at least one, each once; labels: their relevance, as many.

    identical: rows with the id of the query, no negatives of it: in some sets of BEIR a query is a document itself.
    """

    text: str
    positives: np.ndarray
    labels: list[float]
    identical: tuple[int, ...] = ()


@dataclass(frozen=True)
class QuerySet:
    """queries: by text, each once. read: how many the source had, repeated ones counted again; without_text: those
    of them that are blank and left out, since the trainer takes no such query."""

    queries: list[Query]
    read: int
    without_text: int

    def digest(self) -> str:
        """Of all queries with their positives and labels, and of nothing else that the source holds."""
        content = hashlib.blake2b(digest_size=16)
        for query in self.queries:
            content.update(json.dumps([query.text, query.positives.tolist(), query.labels, query.identical]).encode())
        return content.hexdigest()


def demand_labels_above_zero(queries: QuerySet) -> None:
    """For formats in which a positive has its own label and a negative 0. Raises DataError with all that do not."""
    bad = BadLines()
    for query in queries.queries:
        if min(query.labels) <= 0:
            bad.add(
                f"query {query.text[:50]!r}: a positive has the label {min(query.labels):g}, and mined negatives get "
                "0; expected labels above 0: use output_format pos_neg, or labels score."
            )
    bad.raise_any()


class _Collector:
    """Positives by query, and what was wrong, as lines of one error."""

    def __init__(self) -> None:
        self.labels: dict[str, dict[int, float]] = {}  # query text to row to label
        self.identical: dict[str, set[int]] = {}  # query text to rows
        self.bad = BadLines()

    def add(self, query: str, row: int, label: float) -> None:
        of_query = self.labels.setdefault(query, {})
        of_query[row] = max(label, of_query.get(row, label))

    def finish(self, read: int, without_text: int = 0) -> QuerySet:
        self.bad.raise_any()
        queries = []
        for text in sorted(self.labels):
            rows = sorted(self.labels[text])
            labels = [self.labels[text][row] for row in rows]
            queries.append(Query(text, np.array(rows, np.int64), labels, tuple(sorted(self.identical.get(text, ())))))
        return QuerySet(queries, read, without_text)


def read_queries(data: str, split: str, corpus: Corpus) -> QuerySet:
    """data: a folder in BEIR layout, whose `split` is read, or a file of records."""
    return read_beir_queries(Path(data), split, corpus) if Path(data).is_dir() else read_record_queries(data, corpus)


def read_beir_queries(folder: Path, split: str, corpus: Corpus) -> QuerySet:
    """The queries that qrels/<split>.tsv judges. A positive has a grade above 0, its label is the grade.

    Raises DataError with every query that has no positive, and every positive that is not in the corpus.
    """
    qrels = find_qrels(folder, split)
    texts = query_texts(find_file(folder, "queries.jsonl"), spaces_in_ids=True)
    collector, judged, answered, without_text = _Collector(), {}, set(), set()
    for line, query, document, grade in judgments(qrels):
        place = f"{qrels}:{line}"
        judged.setdefault(query, place)
        if query not in texts:
            collector.bad.add(f"{place}: queries.jsonl has no query {query!r}; add it, or remove this line.")
        elif not texts[query].strip():
            without_text.add(query)
        elif grade > 0:
            answered.add(query)
            row = corpus.row_of_id(document)
            if row is None:
                collector.bad.add(f"{place}: the corpus has no document {document!r}; add it, or remove this line.")
            else:
                collector.add(texts[query], row, grade)
    for query in answered:
        row = corpus.row_of_id(query)
        if row is not None:
            collector.identical.setdefault(texts[query], set()).add(row)
    for query, place in judged.items():
        if query in texts and query not in answered | without_text:
            found = f"{place}: query {query!r} has no positive (grade above 0)"
            collector.bad.add(f"{found}; add one, or remove the query.")
    return collector.finish(len(judged), len(without_text))


def read_record_queries(source: str, corpus: Corpus) -> QuerySet:
    """The queries of a record file with the positives of their groups; other documents there are not used.

    A positive is looked up in the corpus by its text, white space and case aside. Raises DataError with every
    group that has no positive, and every positive that is not in the corpus.
    """
    store = open_store(source, group_by_query=True)
    collector = _Collector()
    for index in range(store.num_groups):
        group = store.group(index)
        if not group.positives.any():
            collector.bad.add(f"{source}:{group.line}: the query has no positive; give it one, or remove it.")
        for position in np.flatnonzero(group.positives):
            row = corpus.row_of_text(group.documents[position])
            if row is None:
                start = " ".join(group.documents[position].split())[:50]
                place = f"{source}:{group.lines[position]}"
                collector.bad.add(f"{place}: the corpus has no document with the text of this positive: {start!r}.")
            else:
                collector.add(group.query, row, float(group.labels[position]))
    return collector.finish(store.num_groups)
