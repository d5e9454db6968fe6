"""What the server needs of an embedder: texts to tokens in pieces, tokens to representations, these to vectors.

`encode` may be called from several threads at once, `compute` from one alone. Equal texts of a request are computed
once. What comes out is what `Embedder.encode` gives for the same arguments.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import chain
from pathlib import PurePath
from typing import Any

import numpy as np

from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.infer.encoded_texts import EncodedTexts
from rag_retrieval.infer.output_form import OutputForm, choose_form
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.representations import DENSE
from rag_retrieval.models.text_scoring import distinct
from rag_retrieval.models.vectors import VectorPrecision
from rag_retrieval.serve.batching import Batcher
from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.endpoints import Work, pieces_of
from rag_retrieval.serve.http import RequestError, ServerMetrics
from rag_retrieval.serve.warm_up import MOST_TOKENS, warm_up

EMBEDDER = "embedder"  # in /health, /info and the metrics
FORWARD_TEXTS = 256  # of one forward at most; the backend bounds it by tokens besides

Input = str | tuple[int, ...]  # a text, or its token ids
Place = Callable[[int], str]


@dataclass(frozen=True)
class EmbedTask:
    """What is to be computed. place: what the request calls an input, from its position. forms: of the results, which
    one forward serves. kind, max_length: as of `Embedder.encode`. truncate: False refuses a text of more tokens. left:
    whether it loses its beginning; None for what the model does."""

    inputs: Sequence[Input]
    place: Place
    forms: tuple[OutputForm, ...]
    kind: str | None
    max_length: int
    truncate: bool = True
    left: bool | None = None


@dataclass(frozen=True, eq=False)
class EmbedItem:
    """A text that is to be computed. outputs: the representations that are wanted of it."""

    text: EncodedPair
    outputs: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.text)


@dataclass(frozen=True, eq=False)
class Embedded:
    """results: by precision of dense vectors, each with an entry for each input. tokens: of each input, as computed.
    truncated: positions of the inputs that were not read whole."""

    results: dict[VectorPrecision, EncodedTexts]
    tokens: list[int]
    truncated: list[int]


class EmbedModel:
    """name: what answers call it."""

    def __init__(self, name: str, embedder: Embedder):
        self.name, self.embedder = name, embedder
        encoder = embedder.backend.text_encoder
        self.encoders = {None: encoder, True: encoder.with_truncation(True), False: encoder.with_truncation(False)}
        self.last_token = max(encoder.fast_tokenizer.get_vocab().values())

    @property
    def info(self) -> dict[str, Any]:
        """With the keys of text-embeddings-inference where there are such."""
        settings = self.embedder.settings
        return {
            "model_type": {"embedding": {"pooling": "splade" if settings.is_splade_alone else settings.pooling}},
            "max_input_length": self.embedder.text_limit(),
            "dimensions": self.embedder.dim,
            "representations": list(settings.representations),
            "prompts": list(self.embedder.kinds),
            "similarity": settings.similarity,
            "normalize": settings.normalize,
            "int8": self.embedder.int8_ranges is not None,
        }

    def task(
        self,
        inputs: Sequence[Input],
        place: Place,
        *,
        kind: str | None = None,
        outputs: Sequence[str] | None = None,
        dim: int | None = None,
        normalize: bool | None = None,
        precisions: Sequence[VectorPrecision] = ("float32",),
        max_length: int | None = None,
        truncate: bool = True,
        left: bool | None = None,
    ) -> EmbedTask:
        """Raises ValueError as `Embedder.encode` does, before anything is computed. precisions: one form for each."""
        backend, ranges = self.embedder.backend, self.embedder.int8_ranges
        shape = (outputs, kind, dim, normalize)
        forms = tuple(choose_form(backend, ranges, *shape, precision, pool_factor=1) for precision in precisions)
        return EmbedTask(inputs, place, forms, kind, self.embedder.text_limit(kind, None, max_length), truncate, left)

    def pieces(self, task: EmbedTask) -> Iterator[list[Input]]:
        """The distinct inputs, for `encode`."""
        return pieces_of(dict.fromkeys(task.inputs))

    def encode(self, task: EmbedTask, piece: Sequence[Input]) -> list[EmbedItem]:
        """Raises RequestError where a text is too long and the request forbids to cut it."""
        encoder, how = self.encoders[task.left], {"kind": task.kind, "max_length": task.max_length}
        texts, ids = ([each for each in piece if isinstance(each, str) == is_text] for is_text in (True, False))
        encoded = iter(encoder.encode(texts, **how)), iter(encoder.encode_ids(ids, **how))
        items = [EmbedItem(next(encoded[not isinstance(each, str)]), task.forms[0].names) for each in piece]
        for each, item in zip(piece, items, strict=True):
            if item.text.truncated and not task.truncate:
                place = task.place(task.inputs.index(each))
                limit = f"longer than {task.max_length} tokens, its prompt and special tokens among them"
                raise RequestError(422, f"{place}: {limit}; shorten it, or let it be cut")
        return items

    def compute(self, items: Sequence[EmbedItem]) -> list[dict[str, Any]]:
        """Of each text what the backend gives, by representation."""
        results: list[dict[str, Any]] = [{}] * len(items)
        for outputs in dict.fromkeys(item.outputs for item in items):
            places = [place for place, item in enumerate(items) if item.outputs == outputs]
            texts = [items[place].text for place in places]
            found = self.embedder.backend.encode(texts, FORWARD_TEXTS, outputs)
            for place, *entries in zip(places, *found.values(), strict=True):
                results[place] = dict(zip(found, entries, strict=True))
        return results

    def embedded(self, task: EmbedTask, items: Sequence[EmbedItem], found: Sequence[dict[str, Any]]) -> Embedded:
        """items, found: of the distinct inputs. Raises ValueError for vectors that are not finite."""
        _, places = distinct(task.inputs)
        columns = {name: [each[name] for each in found] for name in task.forms[0].names}
        if DENSE in columns:
            columns[DENSE] = np.stack(columns[DENSE])
        tokenizer = self.encoders[None].fast_tokenizer
        results = {}
        for form in task.forms:
            rows = form.rows(columns)
            results[form.precision] = form.collected([rows[place] for place in places], tokenizer)
        texts = [items[place].text for place in places]
        truncated = [position for position, text in enumerate(texts) if text.truncated]
        return Embedded(results, [len(text) for text in texts], truncated)


async def compute_texts(
    model: EmbedModel, batcher: Batcher, task: EmbedTask, work: Work, first: bool = False
) -> tuple[list[EmbedItem], list[dict[str, Any]]]:
    """What `EmbedModel.embedded` takes. batcher: that of the model. first: as of `Work`. Raises what its steps do."""
    pieces = await work.encode(model.pieces(task), partial(model.encode, task), first)
    items = list(chain.from_iterable(pieces))
    return items, await work.compute(batcher, items, first)


# ---- before the server listens --------------------------------------------------------------------------


@contextmanager
def opened_embedder(config: ServeConfig, metrics: ServerMetrics) -> Iterator[tuple[EmbedModel, Batcher]]:
    """The model of `--embedder` and its batcher, warmed up. Raises what opening and computing raise."""
    options = config.embedder_options()
    with Embedder(config.embedder, **options.given(*type(options).model_fields)) as embedder:
        name = config.embedder_name or PurePath(config.embedder).name
        with served_embedder(name, embedder, config, metrics) as served:
            yield served


@contextmanager
def served_embedder(
    name: str, embedder: Embedder, config: ServeConfig, metrics: ServerMetrics, role: str = EMBEDDER
) -> Iterator[tuple[EmbedModel, Batcher]]:
    """Of an embedder that is open already. role: what /health, /info and the metrics call it."""
    model, encoder = EmbedModel(name, embedder), embedder.backend.text_encoder
    texts = ["one", "two", "three", "four", "word " * 2 * encoder.max_length]
    task = model.task(texts, "texts[{}]".format, outputs=embedder.settings.representations)
    with Batcher(model.compute, MOST_TOKENS, metrics.batch_counter(role)) as batcher:
        items, outputs = model.encode(task, texts), task.forms[0].names
        warm_up(name, encoder, batcher, items, lambda text: EmbedItem(text, outputs), config.batch_tokens)
        yield model, batcher
