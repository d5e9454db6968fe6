"""What retrieval is measured on: queries, the documents that are searched, and the grades of the relevant ones."""

import zlib
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

import numpy as np

from rag_retrieval.data.beir import Pool, Qrels, find_optional, read_folder, read_pool, read_qrels
from rag_retrieval.data.store import RecordStore
from rag_retrieval.metrics import is_relevant, relevance_threshold


@dataclass(frozen=True)
class Collection:
    """queries, documents: texts by id, documents by rising id (as bytes). qrels: grades by the ids of query and
    document; each query has an entry.
    prompts: of queries that have one of their own, by id. pool: the only documents that are ranked for a query; None
    where all are. relevant_from: the smallest grade of a relevant document."""

    source: str
    queries: dict[str, str]
    documents: dict[str, str]
    qrels: Qrels
    prompts: dict[str, str] = field(default_factory=dict)
    pool: Pool | None = None
    relevant_from: float = 1.0

    @cached_property
    def checksum(self) -> int:
        """Of ids, texts and grades."""
        value = 0
        for part in (self.queries, self.documents, self.qrels, self.prompts, self.pool or {}):
            for item in part.items():
                value = zlib.crc32(repr(item).encode(), value)
        return value

    @property
    def without_relevant(self) -> list[str]:
        """Ids of the queries that no document is relevant for, so that no ranking of them is better than another."""
        return [query for query, grades in self.qrels.items() if not self._relevant(list(grades.values())).any()]

    @property
    def not_in_corpus(self) -> list[str]:
        """Ids of relevant documents that no search can find, since the corpus has them not."""
        absent = {
            document
            for grades in self.qrels.values()
            for document, grade in grades.items()
            if document not in self.documents and self._relevant(grade)
        }
        return sorted(absent)

    def _relevant(self, grades) -> np.ndarray:
        return is_relevant(grades, self.relevant_from)


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
    a document, with the highest of its grades.

    store: for embedders, whose ids say what texts are equal. An id is a number in the order of the file: of equal
    scores the later document ranks first. What is relevant is for `relevance_threshold` to decide.
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
    threshold = relevance_threshold(store.labels)
    return Collection(source, queries, documents, qrels, prompts, relevant_from=threshold)


def first_of_each(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions of the first copy of each id, ascending; for each position which of these it is a copy of)."""
    _, first, copies = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[copies]


def number(place: int) -> str:
    return f"{place:010d}"  # ids compare as texts
