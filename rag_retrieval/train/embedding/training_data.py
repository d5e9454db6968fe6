"""From the record store to the micro-batches of one optimizer step of an embedder.

The texts of a step are embedded once each, whatever records they stand in: an item of `EmbeddingSteps` is the whole
share of one process of a step, its distinct queries and documents together, cut by tokens alone. What belongs to what
is said by the ids of the texts (`StepRecords`), so that no cut changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset

from rag_retrieval.data.sampling import epoch_order, sample_group
from rag_retrieval.data.step_records import QUERY_MARK, KnownPositives, StepRecords, ragged
from rag_retrieval.data.store import RecordStore
from rag_retrieval.models.token_batch import TokenBatch, make_batch, plan_by_tokens
from rag_retrieval.train.steps import StepShape


@dataclass
class EmbeddingMicroBatch:
    """Texts, the first `queries` of which are queries and the others documents, and what they are in the step.

    ids: uint64 [texts], of the texts: see `StepRecords`. records: of all texts of this process in the step, in the
    first of its micro-batches; None in the others. `items` is their number, `size` that of the texts, `sources` names
    the records as `file:line`, `part` the file where there are several. A filler has one text and no id: its vector is
    nobody's.
    """

    texts: TokenBatch
    ids: np.ndarray
    queries: int
    records: StepRecords | None
    items: tuple[int, ...]
    size: int
    sources: list[str]
    part: str = ""

    def to(self, device: torch.device) -> "EmbeddingMicroBatch":
        """Itself: the model's forward lays texts out on the host, and ids are compared there."""
        return self

    def pin_memory(self) -> "EmbeddingMicroBatch":
        return self


@dataclass(frozen=True)
class SamplingOptions:
    """group_size: a positive and the hard negatives of a record at most. shuffle: otherwise in the order of the file.
    max_tokens, padded: see `plan_by_tokens`."""

    seed: int
    group_size: int
    shuffle: bool = True
    max_tokens: int | None = None
    padded: bool = True


@dataclass(frozen=True)
class Example:
    """A record as this pass over the data shows it. positive and negatives: pairs of the store."""

    group: int
    positive: int
    negatives: np.ndarray


class EmbeddingSteps(Dataset):
    """The steps of one file, for `CarriedSteps`: shape.records are those of the whole run, whole passes over the file
    and the beginning of one more, by which the last step is full. A record shows one positive in a pass, the next one
    in the next, and negatives in turns.

    encoder: the model's `text_encoder`. all_stores: of all training files, for the known positives of a query.
    part: the file's name where there are several, "" otherwise.
    """

    def __init__(
        self,
        store: RecordStore,
        source: str,
        encoder: Any,
        shape: StepShape,
        options: SamplingOptions,
        all_stores: Sequence[RecordStore] = (),
        part: str = "",
    ):
        self.store, self.source, self.encoder, self.shape, self.options = store, source, encoder, shape, options
        self.all_stores, self.part = all_stores or [store], part
        self.groups = groups_with_positive(store)
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.shape.steps_per_epoch

    def __getitem__(self, position: tuple[int, int]) -> list[EmbeddingMicroBatch]:
        start = position[0] * self.shape.records
        places = [start + place for share in self.shape.positions(position[1]) for place in share]
        return self.micro_batches([self.example(*divmod(place, len(self.groups))) for place in places])

    def example(self, pass_number: int, place: int) -> Example:
        """The record at a place of the order of one pass over the file."""
        record = int(self._order_of(pass_number)[place])
        store, options, group = self.store, self.options, int(self.groups[record])
        first, size = int(store.group_offsets[group]), int(store.group_sizes[group])
        positive = store.positives[first : first + size]
        kept = sample_group(positive, options.group_size, pass_number, options.seed, record, one_positive=True)
        return Example(group, first + int(kept[positive[kept]][0]), first + kept[~positive[kept]])

    def _order_of(self, pass_number: int) -> np.ndarray:
        if not self.options.shuffle:
            return np.arange(len(self.groups))
        if self._order is None or self._order[0] != pass_number:
            self._order = (pass_number, epoch_order(self.options.seed, pass_number, len(self.groups)))
        return self._order[1]

    @cached_property
    def known_positives(self) -> KnownPositives:
        return KnownPositives(self.all_stores)

    def micro_batches(self, examples: Sequence[Example]) -> list[EmbeddingMicroBatch]:
        """The distinct texts of the examples, cut by the token budget."""
        queries, documents = self._texts(examples)
        ids = np.array([*queries, *documents], np.uint64)
        encoded = self._encode(queries, documents)
        plan = plan_by_tokens([[len(text)] for text in encoded], self.options.max_tokens, padded=self.options.padded)
        batches = []
        for part in plan:
            part = np.array(sorted(part))  # queries come first
            texts, counted = make_batch([encoded[place] for place in part]), int((part < len(queries)).sum())
            batches.append(EmbeddingMicroBatch(texts, ids[part], counted, None, (0,), len(part), [], self.part))
        batches[0].records, batches[0].items = self.step_records(examples), (len(examples),)
        lines = [self.store.lines[example.positive] for example in examples]
        batches[0].sources = [f"{self.source}:{line}" for line in lines]
        return batches

    def _texts(self, examples: Sequence[Example]) -> tuple[dict[int, int], dict[int, int]]:
        """The group of each distinct query and the pair of each distinct document, by id."""
        store, queries, documents = self.store, {}, {}
        for example in examples:
            queries.setdefault(int(store.query_ids[example.group] ^ QUERY_MARK), example.group)
            for pair in (example.positive, *example.negatives.tolist()):
                documents.setdefault(int(store.document_ids[pair]), pair)
        return queries, documents

    def _encode(self, queries: dict[int, int], documents: dict[int, int]) -> list[Any]:
        """Token ids of the queries, then of the documents. A record's prompt stands in place of the model's own."""
        store = self.store
        texts = [store.query(group) for group in queries.values()]
        prompts = [store.prompts[group] for group in queries.values()]
        encoded = self.encoder.encode(texts, "query")
        for prompt in set(prompts) - {""}:
            places = [place for place, own in enumerate(prompts) if own == prompt]
            own = self.encoder.encode([texts[place] for place in places], "query", prompt=prompt)
            for place, text in zip(places, own, strict=True):
                encoded[place] = text
        return encoded + self.encoder.encode([store.pair(pair).document for pair in documents.values()], "document")

    def step_records(self, examples: Sequence[Example]) -> StepRecords:
        store = self.store
        groups = np.array([example.group for example in examples])
        positives = np.array([example.positive for example in examples])
        negative_pairs, negative_offsets = ragged([example.negatives for example in examples], "i8")
        known, known_offsets = ragged([self.known_positives.of(id_) for id_ in store.query_ids[groups]], "u8")
        scores = store.teacher_scores
        return StepRecords(
            store.query_ids[groups] ^ QUERY_MARK,
            store.document_ids[positives],
            store.document_ids[negative_pairs],
            negative_offsets,
            known,
            known_offsets,
            None if scores is None else scores[positives],
            None if scores is None else scores[negative_pairs],
        )

    def filler(self) -> EmbeddingMicroBatch:
        """One text of weight zero, for a process that has fewer micro-batches than another."""
        texts, no_ids = make_batch(self.encoder.encode(["filler"], "document")), np.empty(0, np.uint64)
        return EmbeddingMicroBatch(texts, no_ids, 0, None, (0,), 0, [], self.part)


def groups_with_positive(store: RecordStore) -> np.ndarray:
    """The groups of a store that have a positive document, ascending: the others teach nothing."""
    return np.flatnonzero(np.logical_or.reduceat(store.positives, store.group_offsets))
