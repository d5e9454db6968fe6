"""Steps of records for the tests of embedding losses: vectors, ids and records over several processes."""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from rag_retrieval.data.step_records import StepRecords, first_of_each, ragged
from rag_retrieval.losses.embedding import Objective
from rag_retrieval.losses.step_gradients import StepGradients, representation_gradients
from rag_retrieval.losses.step_outputs import StepOutputs
from rag_retrieval.losses.step_targets import targets_of

DIM = 12


@dataclass
class Step:
    """queries [Q, dim] and documents [D, dim] are distinct texts; records are those of one process."""

    queries: Tensor
    documents: Tensor
    query_ids: np.ndarray
    document_ids: np.ndarray
    records: StepRecords

    def parts(self, sizes: list[int]) -> list[StepRecords]:
        """The records cut into as many processes, with these numbers of records."""
        ends = np.cumsum(sizes)
        return [records_between(self.records, end - size, end) for size, end in zip(sizes, ends, strict=True)]


def step_records(query_ids, positive_ids, negatives=None, known=None, **optional) -> StepRecords:
    """negatives, known: one list of ids for each record; None: no negatives, and each positive is the one known."""
    negatives = [[]] * len(query_ids) if negatives is None else negatives
    known = [[positive] for positive in positive_ids] if known is None else known
    arrays = [np.array(ids, np.uint64) for ids in (query_ids, positive_ids)]
    rows = [ragged([np.array(row, np.uint64) for row in each], "uint64") for each in (negatives, known)]
    floats = {name: np.array(values, np.float32) for name, values in optional.items()}
    return StepRecords(*arrays, *rows[0], *rows[1], **floats)


def records_between(records: StepRecords, start: int, end: int) -> StepRecords:
    negatives = slice(*records.negative_offsets[[start, end]])
    known = slice(*records.known_positive_offsets[[start, end]])
    rows = slice(start, end)
    of = {"query_ids": rows, "positive_ids": rows, "negative_ids": negatives, "known_positive_ids": known,
          "positive_scores": rows, "negative_scores": negatives, "labels": rows, "teacher_vectors": rows}  # fmt: skip
    values = {name: getattr(records, name) for name in of}
    return StepRecords(
        **{name: None if value is None else value[of[name]] for name, value in values.items()},
        negative_offsets=records.negative_offsets[start : end + 1] - negatives.start,
        known_positive_offsets=records.known_positive_offsets[start : end + 1] - known.start,
    )


def random_step(records: int = 7, seed: int = 0) -> Step:
    """Records with two or three negatives each, some documents shared, one query twice, known positives in the step."""
    numbers = np.random.default_rng(seed)
    queries = np.arange(records, dtype=np.uint64) + np.uint64(100)
    queries[-1] = queries[0]
    pool = np.arange(3 * records, dtype=np.uint64) + np.uint64(500)
    positives = pool[:records]
    counts = numbers.integers(2, 4, records)
    negatives = np.concatenate([numbers.choice(pool, count, replace=False) for count in counts])
    known = np.concatenate([[positive, numbers.choice(pool)] for positive in positives]).astype(np.uint64)
    record = StepRecords(
        queries, positives, negatives, np.concatenate([[0], counts.cumsum()]), known,
        np.arange(records + 1) * 2, numbers.normal(size=records).astype(np.float32),
        numbers.normal(size=len(negatives)).astype(np.float32), numbers.random(records).round(1).astype(np.float32),
    )  # fmt: skip
    texts = np.concatenate([positives, negatives])
    query_ids, document_ids = (of[first_of_each(of)[0]] for of in (queries, texts))
    torch.manual_seed(seed)
    return Step(torch.randn(len(query_ids), DIM), torch.randn(len(document_ids), DIM), query_ids, document_ids, record)


def vector_gradients(objective, queries: Tensor, documents: Tensor, targets, factor, *guide, **options):
    """Of dense vectors alone: `StepGradients` whose queries and documents are the gradients at these."""
    outputs = (StepOutputs(dense=each) for each in (queries, documents))
    found = representation_gradients(objective, *outputs, targets, factor, *guide, **options)
    return found._replace(queries=found.queries.dense, documents=found.documents.dense)


def gradients(step: Step, objective: Objective, sizes: list[int] | None = None, **options) -> StepGradients:
    """Of all records of the step, added up over processes with these numbers of records."""
    parts = step.parts(sizes or [len(step.records.query_ids)])
    done = [
        vector_gradients(
            objective, step.queries, step.documents, targets_of(step.query_ids, step.document_ids, parts, process),
            **{"factor": 1.0, **options},
        )
        for process in range(len(parts))
    ]  # fmt: skip
    report = {name: sum(each.report.get(name, 0.0) for each in done) for name in done[0].report}
    return StepGradients(
        torch.cat([each.losses for each in done]),
        sum(each.queries for each in done),
        sum(each.documents for each in done),
        report,
    )


class LargestTensor(TorchDispatchMode):
    """Watches the number of values of every tensor that an operation makes."""

    values = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        for each in made if isinstance(made, (tuple, list)) else [made]:
            if isinstance(each, torch.Tensor):
                self.values = max(self.values, each.numel())
        return made
