"""What retrieval is measured on: queries, the documents that are searched, and the grades of the relevant ones."""

import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from rag_retrieval.data.beir import Pool, Qrels, find_optional, read_folder, read_pool, read_qrels
from rag_retrieval.data.step_records import first_of_each
from rag_retrieval.data.store import RecordStore


@dataclass(frozen=True)
class Collection:
    """queries, documents: texts by id, documents by rising id (as bytes). qrels: grades by the ids of query and
    document; each query has an entry.
    prompts: of queries that have one of their own, by id. pool: the only documents that are ranked for a query; None
    where all are. positives: ids of queries with those of their relevant documents; None: those of grade 1 and more."""

    source: str
    queries: dict[str, str]
    documents: dict[str, str]
    qrels: Qrels
    prompts: dict[str, str] = field(default_factory=dict)
    pool: Pool | None = None
    positives: set[tuple[str, str]] | None = None

    @cached_property
    def checksum(self) -> int:
        """Of ids, texts, grades and what is relevant."""
        value = 0
        for part in (self.queries, self.documents, self.qrels, self.relevance, self.prompts, self.pool or {}):
            for item in part.items():
                value = zlib.crc32(repr(item).encode(), value)
        return value

    @cached_property
    def relevance(self) -> Qrels:
        """1 for a relevant document and 0 for another, of all that `qrels` has."""
        return {
            query: {
                document: float(grade >= 1 if self.positives is None else (query, document) in self.positives)
                for document, grade in grades.items()
            }
            for query, grades in self.qrels.items()
        }

    @property
    def without_relevant(self) -> list[str]:
        """Ids of the queries that no document is relevant for, so that no ranking of them is better than another."""
        return [query for query, relevance in self.relevance.items() if not any(relevance.values())]

    @property
    def not_in_corpus(self) -> list[str]:
        """Ids of relevant documents that no search can find, since the corpus has them not."""
        absent = {
            document
            for relevance in self.relevance.values()
            for document, is_relevant in relevance.items()
            if document not in self.documents and is_relevant
        }
        return sorted(absent)


def is_beir_folder(source: str | Path) -> bool:
    return find_optional(Path(source), "queries.jsonl") is not None


def beir_collection(source: str | Path, split: str) -> Collection:
    """The queries of a split, each against the whole corpus or its pool. DataError for what is wrong in the files."""
    folder = read_folder(source)
    qrels = read_qrels(folder, split)
    queries = {query: folder.queries[query] for query in qrels}
    documents = {id_: folder.documents[id_] for id_ in sorted(folder.documents, key=str.encode)}
    return Collection(str(source), queries, documents, qrels, pool=read_pool(folder, split))


def store_collection(store: RecordStore, source: str) -> Collection:
    """The queries of ranking records, each against the documents of all records. A text counts once, as a query and as
    a document, with the highest of its grades. Relevant is what is a positive of the query in any record: see
    `records.positives`.

    store: for embedders, whose ids say what texts are equal. An id is a number in the order of the file: of equal
    scores the later document ranks first.
    """
    first_groups, query_of = first_of_each(store.query_ids)
    first_pairs, document_of = first_of_each(store.document_ids)
    queries = {number(place): store.query(int(group)) for place, group in enumerate(first_groups)}
    prompts = {number(place): store.prompts[int(group)] for place, group in enumerate(first_groups)}
    documents = {number(place): store.pair(int(pair)).document for place, pair in enumerate(first_pairs)}
    qrels: Qrels = {query: {} for query in queries}
    of_pairs = np.repeat(query_of, store.group_sizes).tolist()
    for query, document, label in zip(of_pairs, document_of.tolist(), store.labels.tolist(), strict=True):
        grades, document = qrels[number(query)], number(document)
        grades[document] = max(label, grades.get(document, label))
    prompts = {query: prompt for query, prompt in prompts.items() if prompt}
    pairs = np.flatnonzero(store.positives)
    positives = {(number(of_pairs[pair]), number(document_of[pair])) for pair in pairs.tolist()}
    return Collection(source, queries, documents, qrels, prompts, positives=positives)


def number(place: int) -> str:
    return f"{place:010d}"  # ids compare as texts
