"""What the server needs of a reranker: texts to tokens in pieces, tokens to scores, scores to documents.

`RerankModel.encode` may be called from several threads at once, `score` from one alone. A document without text is not
read by the model; equal documents of a request are computed once.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import PurePath
from typing import Any

import numpy as np
from starlette.responses import JSONResponse, Response

from rag_retrieval.infer.backend import Backend, open_backend
from rag_retrieval.infer.long_documents import NO_TEXT, EncodedDocument, PassageEncoder, ScoredPair, document_tokens
from rag_retrieval.infer.results import ScoreType, shown_scores
from rag_retrieval.models.options import OVERLAP
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.serve.batching import Batcher
from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.endpoints import Endpoint, Work, pieces_of
from rag_retrieval.serve.http import RequestError, ServerMetrics
from rag_retrieval.serve.schemas import RerankTask, document_answer, limited_request, parse_request, text_answer
from rag_retrieval.serve.warm_up import MOST_TOKENS, warm_up

RERANKER = "reranker"  # in /health, /info and the metrics
LABEL = "LABEL_0"  # what transformers calls the one label of a head that was not given a name
FORWARD_PAIRS = 256  # of one forward at most; the backend bounds it by tokens besides


@dataclass
class EncodedTask:
    """Filled piece by piece. query_ids: by query, of this request's alone. documents: by text. truncated: texts that
    are not read whole."""

    query_ids: dict[str, np.ndarray] = field(default_factory=dict)
    documents: dict[str, EncodedDocument] = field(default_factory=dict)
    truncated: set[str] = field(default_factory=set)

    @property
    def pairs(self) -> list[EncodedPair]:
        return [pair for document in self.documents.values() for pair in document.pairs]

    def truncated_of(self, task: RerankTask) -> list[int]:
        """Positions of the task's documents that are not read whole."""
        return [position for position, text in enumerate(task.documents) if text in self.truncated]


class RerankModel:
    """name: what answers call it. long_document, overlap: as for `Reranker.rerank`."""

    def __init__(self, name: str, backend: Backend, long_document: str, overlap: int = OVERLAP):
        self.name = name
        self.backend = backend
        self.encoder = PassageEncoder(backend.pair_encoder, long_document, overlap)

    @property
    def score_type(self) -> ScoreType:
        """Of what is shown where no logits are asked for."""
        return shown_scores(np.empty(0, np.float32), self.backend.calibration, normalize=True)[1]

    @property
    def info(self) -> dict[str, Any]:
        """For /info."""
        return {
            "model_type": {"reranker": {"id2label": {"0": LABEL}, "label2id": {LABEL: 0}}},
            "max_input_length": self.backend.pair_encoder.max_length,
            "long_document": self.encoder.long_document,
            "score_type": self.score_type,
        }

    def pieces(self, task: RerankTask) -> Iterator[list[str]]:
        """The distinct documents with a text."""
        return pieces_of(text for text in dict.fromkeys(task.documents) if text.strip())

    def encode(self, task: RerankTask, texts: list[str], encoded: EncodedTask) -> None:
        """Adds a piece to `encoded`. Raises RequestError where a text is too long and the request forbids to cut it."""
        kept = [self._beginning(text, task.max_document_tokens) for text in texts]
        documents = self.encoder.encode([(task.query, text) for text in kept], encoded.query_ids)
        for text, beginning, document in zip(texts, kept, documents, strict=True):
            if document.truncated or len(beginning) < len(text):
                if not task.truncate:
                    place, limit = task.place(task.documents.index(text)), self.backend.pair_encoder.max_length
                    reason = f"longer, with its query, than the {limit} tokens of this model"
                    raise RequestError(422, f"{place}: {reason}; shorten it, or leave truncate out")
                encoded.truncated.add(text)
            encoded.documents[text] = document

    def _beginning(self, text: str, most_tokens: int | None) -> str:
        if most_tokens is None:
            return text
        tokens = document_tokens(self.backend.pair_encoder, text)
        return text if len(tokens.content) <= most_tokens else text[: tokens.span(0, most_tokens)[1]]

    def score(self, pairs: list[EncodedPair]) -> np.ndarray:
        """Logits: [pairs], float32."""
        return self.backend.score(pairs, FORWARD_PAIRS)

    def scored(self, task: RerankTask, encoded: EncodedTask, scores: list[np.float32]) -> list[ScoredPair]:
        """Of each document in the order of the request; NO_TEXT without text. scores: of `encoded.pairs`. Raises
        ValueError for scores that are not finite."""
        combined = self.encoder.combine(list(encoded.documents.values()), np.array(scores, np.float32))
        scored_of = dict(zip(encoded.documents, combined, strict=True))
        return [scored_of.get(text, NO_TEXT) for text in task.documents]

    def shown(self, logits: np.ndarray, raw: bool) -> tuple[np.ndarray, ScoreType]:
        return shown_scores(logits, self.backend.calibration, normalize=not raw)


async def compute_documents(
    model: RerankModel, batcher: Batcher, tasks: Sequence[RerankTask], work: Work
) -> tuple[list[EncodedTask], list[list[np.float32]]]:
    """For each task its tokens and their scores, which `RerankModel.scored` takes. batcher: that of the model; it gets
    the pairs of all tasks at once, which fill its batches together. Raises what its steps do."""
    encoded = [EncodedTask() for _ in tasks]
    for task, own in zip(tasks, encoded, strict=True):
        await work.encode(model.pieces(task), partial(model.encode, task, encoded=own))
    scores = iter(await work.compute(batcher, [pair for own in encoded for pair in own.pairs]))
    return encoded, [list(islice(scores, len(own.pairs))) for own in encoded]


class RerankEndpoint(Endpoint):
    """The rerank requests of Cohere, Jina, vLLM and text-embeddings-inference: the keys of a request decide how it is
    answered."""

    paths = ("/rerank", "/v1/rerank", "/v2/rerank")

    def __init__(self, config: ServeConfig, model: RerankModel, batcher: Batcher, metrics: ServerMetrics):
        self.model = model
        self.batcher = batcher
        self.batchers = (batcher,)
        self.truncated = metrics.truncated.labels(RERANKER)
        self.schema, self.max_characters = limited_request(config.max_documents), config.max_characters

    def parse(self, body: bytes, path: str) -> RerankTask:
        return parse_request(body, self.schema, self.max_characters)

    def size(self, task: RerankTask) -> int:
        return len(task.documents)

    async def answer(self, task: RerankTask, work: Work) -> Response:
        (encoded,), (scores,) = await compute_documents(self.model, self.batcher, [task], work)
        logits = np.array([document.score for document in self.model.scored(task, encoded, scores)], np.float32)
        shown, score_type = self.model.shown(logits, task.raw_scores)
        truncated = encoded.truncated_of(task)
        self.truncated.inc(len(truncated))
        if task.as_texts:
            answer = text_answer(task, logits, shown)
        else:
            tokens = sum(map(len, encoded.pairs))
            answer = document_answer(task, logits, shown, score_type, tokens, truncated, self.model.name, work.id)
        return JSONResponse(answer, headers={"X-Score-Type": score_type})


# ---- before the server listens --------------------------------------------------------------------------


@contextmanager
def opened_reranker(config: ServeConfig, metrics: ServerMetrics) -> Iterator[tuple[RerankModel, Batcher]]:
    """The model of `--model` and its batcher, warmed up. Raises what opening and scoring raise."""
    backend = open_backend(config.model, config.model_options())
    try:
        model = RerankModel(config.name or PurePath(config.model).name, backend, config.long_document, config.overlap)
        with Batcher(model.score, MOST_TOKENS, metrics.batch_counter(RERANKER)) as batcher:
            warm_up_reranker(model, batcher, config.batch_tokens)
            yield model, batcher
    finally:
        backend.close()


def warm_up_reranker(model: RerankModel, batcher: Batcher, batch_tokens: int | None) -> None:
    """See `warm_up`."""
    encoder = model.backend.pair_encoder
    task = RerankTask("query", ["one", "two", "three", "four", "word " * 2 * encoder.max_length])
    encoded = EncodedTask()
    model.encode(task, task.documents, encoded)
    warm_up(model.name, encoder, batcher, encoded.pairs, lambda pair: pair, batch_tokens)
