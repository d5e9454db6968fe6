"""The records of an optimizer step by the ids of their texts, and the known positives of every query in the data.

An id is 64 bits, equal for equal texts (see `RecordStore.document_ids`). A query's is XORed with `QUERY_MARK`: a query
and a document of the same text have different prompts, and so different vectors.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rag_retrieval.data.store import RecordStore

QUERY_MARK = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class StepRecords:
    """One process's records of a step. Ids are uint64; a query may have several records.

    query_ids, positive_ids: [records]. A record of a text alone has no document, and its positive is its query.
    negative_ids: its hard negatives, record after record; those of record i are from negative_offsets[i] to
        negative_offsets[i + 1], int64 [records + 1]. known_positive_ids, known_positive_offsets: likewise, every
        positive of its query in the data, so its own too.
    positive_scores, negative_scores: of a teacher, float32, beside the ids. labels: float32 [records], of graded pairs.
    teacher_vectors: float32 [records, width]. Each of these is None where the loss does not read it.
    """

    query_ids: np.ndarray
    positive_ids: np.ndarray
    negative_ids: np.ndarray
    negative_offsets: np.ndarray
    known_positive_ids: np.ndarray
    known_positive_offsets: np.ndarray
    positive_scores: np.ndarray | None = None
    negative_scores: np.ndarray | None = None
    labels: np.ndarray | None = None
    teacher_vectors: np.ndarray | None = None


class KnownPositives:
    """The positives of each query, under any prompt, over all records of several stores, which have text ids."""

    def __init__(self, stores: Sequence[RecordStore]):
        self.stores = list(stores)
        self._orders = [np.argsort(store.query_text_ids, kind="stable") for store in self.stores]
        self._sorted = [store.query_text_ids[order] for store, order in zip(self.stores, self._orders, strict=True)]

    def of(self, query_text_id: np.uint64) -> np.ndarray:
        """Ids of documents, uint64, each once. query_text_id: as in the stores."""
        found = []
        for store, order, ids in zip(self.stores, self._orders, self._sorted, strict=True):
            first, stop = np.searchsorted(ids, query_text_id), np.searchsorted(ids, query_text_id, "right")
            for group in order[first:stop]:
                pairs = slice(store.group_offsets[group], store.group_offsets[group] + store.group_sizes[group])
                found.append(store.document_ids[pairs][store.positives[pairs]])
        return np.unique(np.concatenate(found)) if found else np.empty(0, np.uint64)


def first_of_each(ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions of the first copy of each id, ascending; for each position which of these it is a copy of)."""
    _, first, copies = np.unique(ids, return_index=True, return_inverse=True)
    order = np.argsort(first)
    return first[order], np.argsort(order)[copies]


def ragged(rows: Sequence[np.ndarray], dtype: str) -> tuple[np.ndarray, np.ndarray]:
    """The values of all rows, one row after another, and where each begins, int64 [rows + 1]."""
    offsets = np.cumsum([0, *map(len, rows)], dtype=np.int64)
    return np.concatenate([np.empty(0, dtype), *rows], dtype=dtype), offsets
