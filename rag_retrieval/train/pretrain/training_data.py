"""From passages to the masked micro-batches of an optimizer step.

What is drawn for a passage (its masked tokens, its spans, the mask of the decoder) depends on the seed, the pass over
the data and the passage alone, so that no cut into processes and micro-batches changes it.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch.utils.data import Dataset

from rag_retrieval.data.passages import Passages
from rag_retrieval.data.sampling import epoch_order
from rag_retrieval.models.loading import NO_LIMIT
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.text_encoding import TextEncoder
from rag_retrieval.models.token_batch import TokenBatch, make_batch, plan_by_tokens
from rag_retrieval.train.steps import StepShape

DRAWS = 4  # the stream of random numbers of `default_rng`, beside those of data.sampling
AS_MASK, AS_RANDOM = 0.8, 0.1  # of the masked tokens; the others stay as they are: BERT, https://arxiv.org/abs/1810.04805
# of a passage's tokens, a span's length: Izacard et al., "Unsupervised Dense Information Retrieval with Contrastive
# Learning" (2021, arXiv 2112.09118), independent cropping
SHORTEST_SPAN, LONGEST_SPAN = 0.1, 0.5


@dataclass
class PretrainMicroBatch:
    """Masked texts: passages, or the two spans of each passage side by side.

    ids: int32 [tokens], before masking. masked: int32 [masked tokens], which of the tokens are to be predicted. seeds:
    int64 [texts], of the decoder's mask. documents: uint64 [texts], equal for texts of one document. counted: False in
    a filler, whose texts have no part in any loss. `items`: masked tokens, then what the other losses count; `size`:
    tokens; `sources` names the documents.
    """

    texts: TokenBatch
    ids: np.ndarray
    masked: np.ndarray
    seeds: np.ndarray
    documents: np.ndarray
    items: tuple[int, ...]
    size: int
    sources: list[str]
    counted: bool = True
    part: str = ""

    def to(self, device: torch.device) -> "PretrainMicroBatch":
        """Itself: the model's forward lays texts out on the host."""
        return self

    def pin_memory(self) -> "PretrainMicroBatch":
        return self


@dataclass(frozen=True)
class MaskingOptions:
    """masked: share of the tokens that are predicted. mask_id: of the mask token. vocabulary: tokens that one can be
    replaced with. max_tokens, padded: see `plan_by_tokens`."""

    seed: int
    loss_type: Literal["retromae", "span_pairs"]
    masked: float
    mask_id: int
    vocabulary: int
    bag_of_words: bool = False
    max_tokens: int | None = None
    padded: bool = True


@dataclass(frozen=True)
class MaskedText:
    """ids: int32 [tokens] with special tokens, before masking; places: those that are masked; encoded: after it."""

    encoded: EncodedPair
    ids: np.ndarray
    places: np.ndarray


@dataclass(frozen=True)
class Example:
    """A passage as this pass over the data shows it. texts: the passage, or two spans of it. place: of the passages."""

    texts: list[MaskedText]
    seed: int
    place: int


class PretrainSteps(Dataset):
    """The steps of a run, for `CarriedSteps`: shape.records are whole passes over all passages and the beginning of one
    more, by which the last step is full.

    encoder: whose texts begin with one special token, cls.
    """

    def __init__(self, sources: Sequence[Passages], encoder: TextEncoder, shape: StepShape, options: MaskingOptions):
        self.sources, self.encoder, self.shape, self.options = list(sources), encoder, shape, options
        self.starts = np.cumsum([0, *map(len, sources)])
        self.suffix = len(encoder.template.suffix)
        self._order: tuple[int, np.ndarray] | None = None

    @property
    def steps_per_epoch(self) -> int:
        return self.shape.steps_per_epoch

    def __getitem__(self, position: tuple[int, int]) -> list[PretrainMicroBatch]:
        """position: (0, step of the run)."""
        return [
            batch
            for places in self.shape.positions(position[1])
            for batch in self.micro_batches([self.example(*divmod(place, self.starts[-1])) for place in places])
        ]

    def example(self, pass_number: int, place: int) -> Example:
        """The passage at a place of the order of one pass over the data."""
        number = int(self._order_of(pass_number)[place])
        passages, own = self._passage(number)
        random = np.random.default_rng([self.options.seed, DRAWS, pass_number, number])
        (whole,) = self.encoder.encode([passages.text(own)], max_length=NO_LIMIT)
        ids = whole.ids[1 : len(whole.ids) - self.suffix]
        parts = [ids] if self.options.loss_type == "retromae" else [random_span(ids, random) for _ in range(2)]
        texts = [self._masked(part, random) for part in parts]
        return Example(texts, int(random.integers(2**62)), number)

    def _order_of(self, pass_number: int) -> np.ndarray:
        if self._order is None or self._order[0] != pass_number:
            self._order = (pass_number, epoch_order(self.options.seed, pass_number, int(self.starts[-1])))
        return self._order[1]

    def _passage(self, number: int) -> tuple[Passages, int]:
        source = int(np.searchsorted(self.starts, number, side="right")) - 1
        return self.sources[source], number - int(self.starts[source])

    def _masked(self, ids: np.ndarray, random: np.random.Generator) -> MaskedText:
        encoded = self.encoder.join([], ids, self.encoder.max_length)
        own = len(encoded.ids) - 1 - self.suffix
        places = 1 + random_places(own, self.options.masked, random)
        masked = encoded.ids.copy()
        masked[places] = replaced(encoded.ids[places], self.options, random)
        return MaskedText(replace(encoded, ids=masked), encoded.ids, places)

    def micro_batches(self, examples: Sequence[Example]) -> list[PretrainMicroBatch]:
        """The examples cut by the token budget; those of an empty list are a filler."""
        if not examples:
            return [self.filler()]
        lengths = [[len(text.ids) for text in example.texts] for example in examples]
        plan = plan_by_tokens(lengths, self.options.max_tokens, padded=self.options.padded)
        return [self._lay_out([examples[place] for place in part]) for part in plan]

    def _lay_out(self, examples: Sequence[Example], counted: bool = True) -> PretrainMicroBatch:
        texts = [text for example in examples for text in example.texts]
        batch = make_batch([text.encoded for text in texts])
        first = np.cumsum(batch.lengths) - batch.lengths
        masked = np.concatenate([text.places + start for text, start in zip(texts, first, strict=True)])
        each = len(examples[0].texts)
        documents, sources = zip(*(self._document(example.place) for example in examples), strict=True)
        items = self._items(batch, len(masked), len(examples)) if counted else (0,) * self.losses
        return PretrainMicroBatch(
            batch,
            np.concatenate([text.ids for text in texts]),
            masked.astype(np.int32),
            np.repeat(np.array([example.seed for example in examples]), each),
            np.repeat(np.array(documents, np.uint64), each),
            items,
            int(batch.lengths.sum()) if counted else 0,
            list(sources) if counted else [],
            counted,
        )

    def _document(self, number: int) -> tuple[int, str]:
        passages, own = self._passage(number)
        return int(passages.document_hashes[own]), passages.document_id(own)

    @property
    def losses(self) -> int:
        return 3 if self.options.bag_of_words else 2

    def _items(self, batch: TokenBatch, masked: int, examples: int) -> tuple[int, ...]:
        if self.options.loss_type == "span_pairs":
            return masked, examples
        own = int((batch.lengths - 1 - self.suffix).sum())
        return (masked, own, examples) if self.options.bag_of_words else (masked, own)

    def filler(self) -> PretrainMicroBatch:
        """A passage of weight zero, for a process that has fewer micro-batches than another."""
        return self._lay_out([self.example(0, 0)], counted=False)


def random_span(ids: np.ndarray, random: np.random.Generator) -> np.ndarray:
    """A run of the ids, of a length from `SHORTEST_SPAN` to `LONGEST_SPAN` of theirs, at least 1."""
    length = max(1, round(len(ids) * random.uniform(SHORTEST_SPAN, LONGEST_SPAN)))
    start = int(random.integers(len(ids) - length + 1)) if len(ids) else 0
    return ids[start : start + length]


def random_places(count: int, share: float, random: np.random.Generator) -> np.ndarray:
    """round(share * count) of range(count), at least one of a positive count: ascending, int64."""
    chosen = min(count, max(1, round(share * count)))
    return np.sort(random.permutation(count)[:chosen])


def replaced(ids: np.ndarray, options: MaskingOptions, random: np.random.Generator) -> np.ndarray:
    """What stands in place of masked tokens: mostly the mask token, else any token or the token itself."""
    draws, others = random.random(len(ids)), random.integers(options.vocabulary, size=len(ids))
    result = np.where(draws < AS_MASK + AS_RANDOM, others, ids)
    return np.where(draws < AS_MASK, options.mask_id, result).astype(ids.dtype)
