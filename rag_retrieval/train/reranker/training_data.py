"""From the record store to the micro-batches of one optimizer step.

`TrainingSteps` is what the loader's workers hold: a path, a tokenizer and a few numbers, never the model and
never the data. Each item is a whole step's share of one process, tokenized and laid out, ready to be moved to
the device.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import groupby, islice

import numpy as np
import torch
from torch.utils.data import Dataset

from rag_retrieval.data.sampling import epoch_order, pair_order, reorder_thirds, sample_group
from rag_retrieval.data.store import RecordStore
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder
from rag_retrieval.models.token_batch import TokenBatch, make_batch, plan_by_tokens
from rag_retrieval.train.reranker.objective import Objective
from rag_retrieval.train.steps import StepShape


@dataclass
class RerankerMicroBatch:
    """Pairs with their labels.

    labels: float32, mask: bool, both [pairs] for pointwise losses and [groups, documents] for grouped ones,
    where the scores fill the True places of the mask row by row. teacher_scores: as labels, None where no loss
    reads them. `items` are the counts of the losses, `size` the number of pairs, `sources` names the records as
    `file:line`, `part` the file where there are several. A filler has one pair and a mask without any True.
    """

    pairs: TokenBatch
    labels: torch.Tensor
    mask: torch.Tensor
    items: tuple[int, ...]
    size: int
    sources: list[str]
    part: str = ""
    teacher_scores: torch.Tensor | None = None

    def to(self, device: torch.device) -> "RerankerMicroBatch":
        """The pairs stay on the host: the model's forward lays them out there."""
        return self._moved(lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "RerankerMicroBatch":
        return self._moved(torch.Tensor.pin_memory)

    def _moved(self, move: Callable[[torch.Tensor], torch.Tensor]) -> "RerankerMicroBatch":
        teacher_scores = None if self.teacher_scores is None else move(self.teacher_scores)
        return replace(self, labels=move(self.labels), mask=move(self.mask), teacher_scores=teacher_scores)

    def place_scores(self, scores: torch.Tensor) -> torch.Tensor:
        """Scores of the pairs, [pairs], in the layout of labels and mask; 0 where the mask is False."""
        return torch.zeros_like(self.labels).masked_scatter(self.mask, scores)


@dataclass(frozen=True)
class SamplingOptions:
    """group_size: documents per group at most (grouped only). lowest, highest: the range that pointwise
    labels are rescaled from. shuffle_rate: see `reorder_thirds`. max_tokens, padded: see `plan_by_tokens`.
    shares_queries: whether the model computes the query of consecutive pairs once."""

    seed: int
    group_size: int | None
    lowest: float
    highest: float
    shuffle_rate: float
    max_tokens: int | None = None
    padded: bool = True
    shares_queries: bool = False


@dataclass(frozen=True)
class Example:
    """One query with the documents that this pass over the data shows: one for pointwise data."""

    query: str
    documents: list[str]
    labels: np.ndarray
    line: int
    teacher_scores: np.ndarray | None


class TrainingSteps(Dataset):
    """The steps of one file, indexed by (epoch, step in epoch); see `StepShape` for which records a step holds.

    shape.records: what an epoch shows, fewer or more than the file has where its weight is not 1. Epochs cut the
    endless row of passes over the file into pieces of that length; in each pass every record stands once, in an order
    of its own. What is drawn for a record (documents of a group, reordered texts) depends on the pass.
    part: the file's name where there are several, "" otherwise.
    """

    def __init__(
        self,
        store: RecordStore,
        source: str,
        encoder: PairEncoder,
        objective: Objective,
        shape: StepShape,
        options: SamplingOptions,
        part: str = "",
    ):
        self.store, self.source, self.encoder, self.objective = store, source, encoder, objective
        self.shape, self.options, self.part = shape, options, part
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.shape.steps_per_epoch

    def __getitem__(self, position: tuple[int, int]) -> list[RerankerMicroBatch]:
        epoch, step = position
        start = epoch * self.shape.records
        return [
            micro_batch
            for places in self.shape.positions(step)
            for micro_batch in self.micro_batches([self._example_at(start + place) for place in places])
        ]

    def _example_at(self, place: int) -> Example:
        """The example at a place of the row of passes."""
        pass_number, place = divmod(place, records_of(self.store, self.objective))
        return self.example(int(self._order_of(pass_number)[place]), pass_number)

    def _order_of(self, pass_number: int) -> np.ndarray:
        if self._order is None or self._order[0] != pass_number:
            seed, store = self.options.seed, self.store
            if self.objective.grouped:
                order = epoch_order(seed, pass_number, store.num_groups)
            else:
                order = pair_order(seed, pass_number, store.group_sizes)
            self._order = (pass_number, order)
        return self._order[1]

    def example(self, record: int, pass_number: int) -> Example:
        return self._group(record, pass_number) if self.objective.grouped else self._pair(record, pass_number)

    def _pair(self, record: int, pass_number: int) -> Example:
        pair = self.store.pair(record)
        labels = rescale(np.array([pair.label], dtype=np.float32), self.options.lowest, self.options.highest)
        document = self._augmented(pair.document, pass_number, record)
        return Example(pair.query, [document], labels, pair.line, self._teacher_scores(record, np.zeros(1, int)))

    def _group(self, record: int, pass_number: int) -> Example:
        group, options = self.store.group(record), self.options
        one_positive = self.objective.one_positive
        kept = sample_group(group.positives, options.group_size, pass_number, options.seed, record, one_positive)
        labels = group.positives if self.objective.reads_positives else group.labels
        first = int(self.store.group_offsets[record])
        documents = [self._augmented(group.documents[place], pass_number, first + int(place)) for place in kept]
        teacher_scores = self._teacher_scores(first, kept)
        return Example(group.query, documents, labels[kept].astype(np.float32), group.line, teacher_scores)

    def _teacher_scores(self, first: int, places: np.ndarray) -> np.ndarray | None:
        """Of the pairs first + places: float32; None where no loss reads them."""
        return self.store.teacher_scores[first + places] if self.objective.needs_teacher else None

    def _augmented(self, text: str, pass_number: int, pair: int) -> str:
        return reorder_thirds(text, self.options.shuffle_rate, self.options.seed, pass_number, pair)

    def micro_batches(self, examples: list[Example]) -> list[RerankerMicroBatch]:
        """Encode examples and lay them out, cut by the token budget; an empty list gives one filler."""
        if not examples:
            return [self.filler()]
        encoded = iter(
            self.encoder.encode([(example.query, text) for example in examples for text in example.documents])
        )
        pairs = [list(islice(encoded, len(example.documents))) for example in examples]
        plan = self._plan(examples, pairs)
        return [self._lay_out([examples[i] for i in part], [pairs[i] for i in part]) for part in plan]

    def _plan(self, examples: list[Example], pairs: list[list[EncodedPair]]) -> list[list[int]]:
        """Positions of the examples of each micro-batch. Where queries are shared, neighbours of one query stay
        neighbours."""
        units = [[place] for place in range(len(examples))]
        if self.options.shares_queries:
            units = [list(run) for _, run in groupby(range(len(examples)), lambda place: examples[place].query)]
        lengths = [self._lengths([pair for place in unit for pair in pairs[place]]) for unit in units]
        plan = plan_by_tokens(lengths, self.options.max_tokens, padded=self.options.padded)
        return [[place for unit in part for place in units[unit]] for part in plan]

    def _lengths(self, pairs: list[EncodedPair]) -> list[int]:
        """Tokens that the model computes for each pair of a unit."""
        batch = make_batch(pairs)
        return (batch.lengths - batch.shared if self.options.shares_queries else batch.lengths).tolist()

    def _lay_out(self, examples: list[Example], pairs: list[list[EncodedPair]]) -> RerankerMicroBatch:
        labels, mask = self._rows([example.labels for example in examples])
        teacher_scores = None
        if self.objective.needs_teacher:
            teacher_scores, _ = self._rows([example.teacher_scores for example in examples])
        flat = [pair for group in pairs for pair in group]
        sources = [f"{self.source}:{example.line}" for example in examples]
        items = self.objective.counts(labels, teacher_scores, mask)
        return RerankerMicroBatch(make_batch(flat), labels, mask, items, len(flat), sources, self.part, teacher_scores)

    def _rows(self, values: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
        """See `layout`; for pointwise losses without the dimension of documents, which is 1."""
        rows, mask = layout(values)
        return (rows, mask) if self.objective.grouped else (rows[:, 0], mask[:, 0])

    def filler(self) -> RerankerMicroBatch:
        """One pair of weight zero, for a process that has less to do than another."""
        labels = torch.zeros((1, 1) if self.objective.grouped else (1,), dtype=torch.float32)
        pairs, nothing = make_batch(self.encoder.encode([("", "")])), (0,) * len(self.objective.losses)
        teacher_scores = labels.clone() if self.objective.needs_teacher else None
        return RerankerMicroBatch(pairs, labels, labels.bool(), nothing, 0, [], self.part, teacher_scores)


def records_of(store: RecordStore, objective: Objective) -> int:
    """How many records a pass over the data has: groups, or pairs for pointwise losses."""
    return store.num_groups if objective.grouped else store.num_pairs


def rescale(labels: np.ndarray, lowest: float, highest: float) -> np.ndarray:
    """Labels of [lowest, highest] moved uniformly to [0, 1], float32: levels 0, 1, 2 become 0, 0.5, 1."""
    return ((labels - np.float32(lowest)) / np.float32(highest - lowest)).astype(np.float32)


def layout(labels: list[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ragged rows as a matrix and its mask: float32 and bool, [rows, longest row]."""
    lengths = torch.tensor([len(row) for row in labels])
    mask = torch.arange(int(lengths.max())) < lengths[:, None]
    values = torch.from_numpy(np.concatenate(labels))
    return torch.zeros(mask.shape, dtype=torch.float32).masked_scatter_(mask, values), mask
