"""From the record store to the micro-batches of one optimizer step of an embedder.

The texts of a step are embedded once each, whatever records they stand in: an item of `EmbeddingSteps` is the whole
share of one process of a step, its distinct queries and documents together, cut by tokens alone. What belongs to what
is said by the ids of the texts (`StepRecords`), so that no cut changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from rag_retrieval.data.sampling import epoch_order, sample_group
from rag_retrieval.data.step_records import QUERY_MARK, KnownPositives, StepRecords, ragged
from rag_retrieval.data.store import RecordStore
from rag_retrieval.models.token_batch import TokenBatch, make_batch, plan_by_tokens
from rag_retrieval.train.steps import StepShape

# A record is a query with a positive and its negatives, a pair with its label, or a text with its teacher's vector.
RecordKind = Literal["positives", "label", "teacher_vectors"]


@dataclass
class EmbeddingMicroBatch:
    """Texts, the first `queries` of which are queries and the others documents, and what they are in the step.

    ids: uint64 [texts], of the texts: see `StepRecords`. records: of all texts of this process in the step, in the
    first of its micro-batches; None in the others. `items` is their number, `size` that of the texts, `sources` names
    the records as `file:line`, `part` the file where there are several. A filler has one text and no id: its vector
    has no part in the loss.
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
    """group_size: a positive and the negatives of a record at most. shuffle: otherwise in the order of the file.
    max_tokens, padded: see `plan_by_tokens`."""

    seed: int
    group_size: int
    shuffle: bool = True
    max_tokens: int | None = None
    padded: bool = True


@dataclass(frozen=True)
class Example:
    """A record as this pass over the data shows it. pair: of the store, the positive or the only one. negatives: pairs
    too."""

    group: int
    pair: int
    negatives: np.ndarray


@dataclass(frozen=True)
class TrainingFile:
    """One file of the training data.

    name: that of the file, "" where it is the only one. records: the numbers of those that are trained on, of groups of
    the store, or of pairs where `kind` is label. teacher_vectors: a raw file of float32, one row for each text of the
    store.
    """

    source: str
    name: str
    store: RecordStore
    kind: RecordKind
    records: np.ndarray
    teacher_vectors: Path | None = None


class EmbeddingSteps(Dataset):
    """The steps of one file, for `CarriedSteps`: shape.records are those of the whole run, whole passes over the file
    and the beginning of one more, by which the last step is full. A query shows one positive in a pass, the next one
    in the next, and negatives in turns; without negatives its other positives, which a teacher's scores tell apart.

    encoder: the model's `text_encoder`. all_stores: of all training files, for the known positives of a query.
    """

    def __init__(
        self,
        file: TrainingFile,
        encoder: Any,
        shape: StepShape,
        options: SamplingOptions,
        all_stores: Sequence[RecordStore] = (),
    ):
        self.file, self.store, self.encoder, self.shape, self.options = file, file.store, encoder, shape, options
        self.all_stores = all_stores or [file.store]
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.shape.steps_per_epoch

    def __getitem__(self, position: tuple[int, int]) -> list[EmbeddingMicroBatch]:
        """position: (0, step of the run)."""
        places = [place for share in self.shape.positions(position[1]) for place in share]
        return self.micro_batches([self.example(*divmod(place, len(self.file.records))) for place in places])

    def example(self, pass_number: int, place: int) -> Example:
        """The record at a place of the order of one pass over the file."""
        number = int(self._order_of(pass_number)[place])
        store, options, record, none = self.store, self.options, int(self.file.records[number]), np.empty(0, np.int64)
        if self.file.kind == "label":
            return Example(store.group_of(record), record, none)
        first = int(store.group_offsets[record])
        if self.file.kind == "teacher_vectors":
            return Example(record, first, none)
        positive = store.positives[first : first + int(store.group_sizes[record])]
        one_positive = store.teacher_scores is None or not positive.all()
        kept = sample_group(positive, options.group_size, pass_number, options.seed, number, one_positive)
        chosen = int(kept[positive[kept]][0])
        return Example(record, first + chosen, first + kept[kept != chosen])

    def _order_of(self, pass_number: int) -> np.ndarray:
        if not self.options.shuffle:
            return np.arange(len(self.file.records))
        if self._order is None or self._order[0] != pass_number:
            self._order = (pass_number, epoch_order(self.options.seed, pass_number, len(self.file.records)))
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
            batches.append(EmbeddingMicroBatch(texts, ids[part], counted, None, (0,), len(part), [], self.file.name))
        batches[0].records, batches[0].items = self.step_records(examples), (len(examples),)
        lines = [self.store.lines[example.pair] for example in examples]
        batches[0].sources = [f"{self.file.source}:{line}" for line in lines]
        return batches

    def _texts(self, examples: Sequence[Example]) -> tuple[dict[int, int], dict[int, int]]:
        """The group of each distinct query and the pair of each distinct document, by id."""
        store, queries, documents = self.store, {}, {}
        for example in examples:
            queries.setdefault(int(store.query_ids[example.group] ^ QUERY_MARK), example.group)
            pairs = () if self.file.kind == "teacher_vectors" else (example.pair, *example.negatives.tolist())
            for pair in pairs:
                documents.setdefault(int(store.document_ids[pair]), pair)
        return queries, documents

    def _encode(self, queries: dict[int, int], documents: dict[int, int]) -> list[Any]:
        """Token ids of the queries, then of the documents."""
        store = self.store
        texts = [store.query(group) for group in queries.values()]
        encoded = encode_queries(self.encoder, texts, [store.prompts[group] for group in queries.values()])
        return encoded + self.encoder.encode([store.pair(pair).document for pair in documents.values()], "document")

    def step_records(self, examples: Sequence[Example]) -> StepRecords:
        store, alone = self.store, self.file.kind == "teacher_vectors"
        groups = np.array([example.group for example in examples])
        pairs = np.array([example.pair for example in examples])
        negatives, negative_offsets = ragged([example.negatives for example in examples], "i8")
        known = [self.known_positives.of(query) for query in store.query_text_ids[groups]]
        known_ids, known_offsets = ragged(known, "u8")
        query_ids, scores = store.query_ids[groups] ^ QUERY_MARK, store.teacher_scores
        return StepRecords(
            query_ids,
            query_ids if alone else store.document_ids[pairs],
            store.document_ids[negatives],
            negative_offsets,
            known_ids,
            known_offsets,
            positive_scores=None if scores is None else scores[pairs],
            negative_scores=None if scores is None else scores[negatives],
            labels=store.labels[pairs] if self.file.kind == "label" else None,
            teacher_vectors=np.array(self._vectors[groups]) if alone else None,
        )

    @cached_property
    def _vectors(self) -> np.ndarray:
        """float32 [texts, width], mapped."""
        return np.memmap(self.file.teacher_vectors, np.float32, "r").reshape(self.store.num_groups, -1)

    def filler(self) -> EmbeddingMicroBatch:
        """One text of weight zero, for a process that has fewer micro-batches than another."""
        texts, no_ids = make_batch(self.encoder.encode(["filler"], "document")), np.empty(0, np.uint64)
        return EmbeddingMicroBatch(texts, no_ids, 0, None, (0,), 0, [], self.file.name)


def encode_queries(encoder: Any, texts: Sequence[str], prompts: Sequence[str]) -> list[Any]:
    """Token ids. prompts: of each text, in place of the model's own; "" for that."""
    encoded = encoder.encode(texts, "query")
    for prompt in set(prompts) - {""}:
        places = [place for place, own in enumerate(prompts) if own == prompt]
        own = encoder.encode([texts[place] for place in places], "query", prompt=prompt)
        for place, text in zip(places, own, strict=True):
            encoded[place] = text
    return encoded


def records_of(store: RecordStore, kind: RecordKind, most: int | None = None, seed: int = 0) -> np.ndarray:
    """The numbers of a store's records, ascending: of groups that have a positive, since the others teach nothing, of
    pairs, or of texts. most: a random sample of so many of them, the same for a seed."""
    if kind == "label":
        records = np.arange(store.num_pairs)
    elif kind == "teacher_vectors":
        records = np.arange(store.num_groups)
    else:
        records = np.flatnonzero(np.logical_or.reduceat(store.positives, store.group_offsets))
    if most is None or most >= len(records):
        return records
    return np.sort(np.random.default_rng([seed, len(records)]).permutation(records)[:most])
