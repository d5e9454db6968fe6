"""What is whose positive in a step: texts by 64-bit id, over all processes, as rows and columns of the step's vectors.

A record is a row of the loss: a query with its positive and its hard negatives. Texts are looked up by id, never by
position, so that neither the number of processes nor equal texts can misalign them.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from rag_retrieval.data.step_records import StepRecords


@dataclass(frozen=True)
class StepTargets:
    """The records of a step by rows of its distinct queries and columns of its distinct documents; R records of all
    processes, of which this process has `own`.

    queries, positives: int64 [R]; positives is -1 where a text stands alone. own: a slice of the R records.
    negatives: int64 [own, k], columns of hard negatives; -1 is padding, and a negative that equals the positive.
    excluded: int64 [2, pairs], (own record, document) that is no negative: another known positive of the query.
    excluded_queries: int64 [2, pairs], (own record, query) of which the record's positive is a known positive, too.
    teacher_scores: float32 [own, 1 + k], the positive's first; 0 at padding. labels: float32 [R].
    teacher_vectors: float32 [R, teacher's width].
    """

    queries: Tensor
    positives: Tensor
    own: slice
    negatives: Tensor
    excluded: Tensor
    excluded_queries: Tensor
    teacher_scores: Tensor | None = None
    labels: Tensor | None = None
    teacher_vectors: Tensor | None = None

    def to(self, device: torch.device | str) -> "StepTargets":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **{name: value.to(device, non_blocking=True) for name, value in tensors.items()})


def targets_of(
    query_ids: np.ndarray, document_ids: np.ndarray, records: Sequence[StepRecords], process: int = 0
) -> StepTargets:
    """The targets of a step for one process, on the CPU.

    query_ids: uint64 [Q], distinct. document_ids: uint64 [D], distinct. records: of all processes, in their order; each
    has a field that another has, or has no records. process: which of them are this process's own.
    """
    own_records, every = records[process], _joined(records)
    query_of, document_of = _Lookup(query_ids), _Lookup(document_ids)
    queries, positives = query_of.places(every["query_ids"]), document_of.places(every["positive_ids"])
    if every["teacher_vectors"] is not None:
        positives[:] = -1
    assert (queries >= 0).all() and (every["teacher_vectors"] is not None or (positives >= 0).all()), (
        "a text is missing"
    )
    start = sum(len(each.query_ids) for each in records[:process])
    own = slice(start, start + len(own_records.query_ids))
    negatives, scores = _negatives(own_records, positives[own], document_of)
    known_queries, known_documents = _known_pairs(records, document_of, queries, positives)
    record, pair = _matches(known_queries, queries[own])
    others = known_documents[pair] != positives[own][record]
    excluded = np.stack([record[others], known_documents[pair][others]])
    record, pair = _matches(known_documents, positives[own])
    others = known_queries[pair] != queries[own][record]
    excluded_queries = np.stack([record[others], known_queries[pair][others]])
    arrays = {
        "queries": queries, "positives": positives, "negatives": negatives, "excluded": excluded,
        "excluded_queries": excluded_queries, "teacher_scores": scores, "labels": every["labels"],
        "teacher_vectors": every["teacher_vectors"],
    }  # fmt: skip
    return StepTargets(own=own, **{name: None if a is None else torch.from_numpy(a) for name, a in arrays.items()})


class _Lookup:
    """Places of ids in an array of distinct ids."""

    def __init__(self, ids: np.ndarray):
        self.order = np.argsort(ids)
        self.sorted = ids[self.order]
        assert (self.sorted[1:] != self.sorted[:-1]).all(), "equal ids; take `distinct` first"

    def places(self, ids: np.ndarray) -> np.ndarray:
        """int64, -1 where an id is not there."""
        if not len(self.sorted):
            return np.full(len(ids), -1)
        nearest = np.minimum(np.searchsorted(self.sorted, ids), len(self.sorted) - 1)
        return np.where(self.sorted[nearest] == ids, self.order[nearest], -1)


def _joined(records: Sequence[StepRecords]) -> dict[str, np.ndarray | None]:
    """The fields with one value for each record, those of all processes one after another."""
    filled = [each for each in records if len(each.query_ids)] or list(records[:1])
    names = ("query_ids", "positive_ids", "labels", "teacher_vectors")
    parts = {name: [getattr(each, name) for each in filled] for name in names}
    return {name: None if values[0] is None else np.concatenate(values) for name, values in parts.items()}


def _negatives(
    records: StepRecords, positives: np.ndarray, document_of: _Lookup
) -> tuple[np.ndarray, np.ndarray | None]:
    """Columns of negatives [own, k] with -1 at padding, and teacher scores [own, 1 + k], 0 at padding."""
    counts = np.diff(records.negative_offsets)
    held = np.arange(counts.max(initial=0)) < counts[:, None]
    negatives = np.full(held.shape, -1)
    negatives[held] = document_of.places(records.negative_ids)
    assert (negatives[held] >= 0).all(), "a negative is missing"
    negatives[negatives == positives[:, None]] = -1
    if records.positive_scores is None:
        return negatives, None
    scores = np.zeros((len(positives), 1 + held.shape[1]), np.float32)
    scores[:, 0] = records.positive_scores
    scores[:, 1:][held] = records.negative_scores
    return negatives, scores


def _known_pairs(
    records: Sequence[StepRecords], document_of: _Lookup, queries: np.ndarray, positives: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and columns of all (query, document) of the step that the data name as positive, each once."""
    ids = np.concatenate([each.known_positive_ids for each in records])
    counts = np.concatenate([np.diff(each.known_positive_offsets) for each in records])
    rows = np.concatenate([np.repeat(queries, counts), queries])
    columns = np.concatenate([document_of.places(ids), positives])
    pairs = np.unique(np.stack([rows, columns])[:, columns >= 0], axis=1)
    return pairs[0], pairs[1]


def _matches(keys: np.ndarray, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """All (i, j) with wanted[i] == keys[j], by ascending i."""
    order = np.argsort(keys, kind="stable")
    first = np.searchsorted(keys[order], wanted, side="left")
    counts = np.searchsorted(keys[order], wanted, side="right") - first
    within = np.arange(counts.sum()) - np.repeat(counts.cumsum() - counts, counts)
    return np.repeat(np.arange(len(wanted)), counts), order[np.repeat(first, counts) + within]
