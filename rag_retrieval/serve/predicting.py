"""`/predict` of text-embeddings-inference, for rerankers: scores of pairs that need not have a query in common."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, create_model
from starlette.responses import JSONResponse, Response

from rag_retrieval.infer.long_documents import EncodedDocument
from rag_retrieval.serve.batching import Batcher
from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.embedding_requests import EmptyRequest
from rag_retrieval.serve.embedding_tei import tei_error_body
from rag_retrieval.serve.endpoints import (
    Endpoint,
    StrictRequest,
    Work,
    check_characters,
    limited_list,
    parse_json,
    pieces_of,
)
from rag_retrieval.serve.http import RequestError, ServerMetrics
from rag_retrieval.serve.reranking import LABEL, RERANKER, RerankModel

PAIRS = "a pair [query, document], or a list of such pairs"


class PredictRequest(StrictRequest):
    inputs: list[str] | list[list[str]]
    raw_scores: bool | None = None
    truncate: bool | None = None
    truncation_direction: Literal["right", "Right"] | None = None


@dataclass(frozen=True)
class Pair:
    query: str
    document: str

    def __len__(self) -> int:
        """Characters."""
        return len(self.query) + len(self.document)


@dataclass(frozen=True)
class PredictTask:
    """listed: whether the request had a list of pairs, and so gets a list of answers."""

    pairs: Sequence[Pair]
    listed: bool
    raw_scores: bool
    truncate: bool

    def place(self, pair: Pair) -> str:
        return f"inputs[{self.pairs.index(pair)}]" if self.listed else "inputs"


class PredictEndpoint(Endpoint):
    paths = ("/predict",)

    def __init__(self, config: ServeConfig, model: RerankModel, batcher: Batcher, metrics: ServerMetrics):
        self.model, self.batcher, self.batchers = model, batcher, (batcher,)
        self.truncated, self.max_characters = metrics.truncated.labels(RERANKER), config.max_characters
        texts = limited_list("texts", str, config.max_documents)
        inputs = Annotated[
            texts | limited_list("pairs", texts, config.max_documents), Field(union_mode="left_to_right")
        ]
        self.schema = create_model("Limited", __base__=PredictRequest, inputs=(inputs, ...))

    def parse(self, body: bytes, path: str) -> PredictTask:
        request = parse_json(body, self.schema, {"inputs": PAIRS})
        if not request.inputs:
            raise EmptyRequest(400, f"inputs: expected {PAIRS}; found an empty list")
        listed = not isinstance(request.inputs[0], str)
        for position, pair in enumerate(request.inputs if listed else [request.inputs]):
            place = f"inputs[{position}]" if listed else "inputs"
            if len(pair) != 2:
                raise RequestError(422, f"{place}: expected a pair [query, document], found {len(pair)} texts")
            check_characters([(f"{place}[{side}]", text) for side, text in enumerate(pair)], self.max_characters)
        pairs = [Pair(*pair) for pair in (request.inputs if listed else [request.inputs])]
        return PredictTask(pairs, listed, request.raw_scores is True, request.truncate is not False)

    def size(self, task: PredictTask) -> int:
        return len(task.pairs)

    async def answer(self, task: PredictTask, work: Work) -> Response:
        encoder, query_ids = self.model.encoder, {}

        def encode(piece: list[Pair]) -> list[EncodedDocument]:
            documents = encoder.encode([(pair.query, pair.document) for pair in piece], query_ids)
            for pair, document in zip(piece, documents, strict=True):
                if document.truncated and not task.truncate:
                    limit = f"longer than the {self.model.backend.pair_encoder.max_length} tokens of this model"
                    raise RequestError(422, f"{task.place(pair)}: {limit}; shorten it, or leave truncate out")
            return documents

        pairs = [pair for pair in dict.fromkeys(task.pairs) if pair.document.strip()]
        documents = list(chain.from_iterable(await work.encode(pieces_of(pairs), encode)))
        scores = await work.compute(self.batcher, [item for document in documents for item in document.pairs])
        self.truncated.inc(sum(document.truncated for document in documents))
        combined = encoder.combine(documents, np.array(scores, np.float32))
        logit_of = {pair: scored.score for pair, scored in zip(pairs, combined, strict=True)}
        logits = np.array([logit_of.get(pair, -np.inf) for pair in task.pairs], np.float32)
        shown, score_type = self.model.shown(logits, task.raw_scores)
        predictions = [[{"score": score, "label": LABEL}] for score in shown.tolist()]
        answer = predictions if task.listed else predictions[0]
        return JSONResponse(answer, headers={"X-Score-Type": score_type})

    def error_body(self, error: RequestError, request_id: str) -> dict[str, Any]:
        return tei_error_body(error)
