"""Cohere's embeddings: `/v2/embed`, and `/v1/embed` of its older client."""

from collections.abc import Callable
from typing import Any, ClassVar, Literal

import numpy as np
from pydantic import Field, create_model

from rag_retrieval.models.vectors import VectorPrecision
from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.embedding import Embedded, EmbedTask
from rag_retrieval.serve.embedding_requests import (
    EmbeddingEndpoint,
    base64_of,
    inputs_of,
    limited_texts,
    listed,
)
from rag_retrieval.serve.endpoints import StrictRequest, cut_warning
from rag_retrieval.serve.http import RequestError

EmbeddingType = Literal["float", "int8", "uint8", "binary", "ubinary", "base64"]
Shown = Callable[[np.ndarray], Any]

# the precision of `Embedder.encode` that a type is made from, and one vector of it as a JSON value. The bytes of binary
# are those of ubinary less 128, as in sentence-transformers
TYPES: dict[EmbeddingType, tuple[VectorPrecision, Shown]] = {
    "float": ("float32", np.ndarray.tolist),
    "int8": ("int8", np.ndarray.tolist),
    "uint8": ("int8", lambda vector: (vector.astype(np.int16) + 128).tolist()),
    "binary": ("binary", lambda vector: (vector.astype(np.int16) - 128).tolist()),
    "ubinary": ("binary", np.ndarray.tolist),
    "base64": ("float32", base64_of),
}


class CohereRequest(StrictRequest):
    """images, inputs: null alone."""

    texts: list[str]
    input_type: str | None = None
    embedding_types: list[EmbeddingType] | None = Field(None, max_length=len(TYPES))
    output_dimension: int | None = Field(None, ge=1)
    max_tokens: int | None = Field(None, ge=1)
    truncate: Literal["NONE", "START", "END"] | None = None
    images: None = None
    inputs: None = None
    # known, and without an influence on the result
    model: str | None = None
    priority: int | None = None

    @property
    def types(self) -> list[EmbeddingType]:
        return self.embedding_types or ["float"]


class CohereEmbed(EmbeddingEndpoint):
    paths = ("/v2/embed",)

    statuses: ClassVar = {424: 422}

    def body_schema(self, config: ServeConfig) -> tuple[type[CohereRequest], dict[str, str]]:
        schema = create_model("Limited", __base__=CohereRequest, texts=(limited_texts(config), ...))
        return schema, {"texts": "a list of texts"}

    def task(self, request: CohereRequest) -> EmbedTask:
        precisions = list(dict.fromkeys(TYPES[name][0] for name in request.types))
        if "int8" in precisions and self.model.embedder.int8_ranges is None:
            missing = "int8 and uint8 need the model's int8_ranges.json, which Embedder.calibrate writes"
            raise RequestError(422, f"embedding_types: {missing}; ask for other types")
        return self.dense_task(
            inputs_of(request.texts, "texts"),
            listed("texts"),
            "output_dimension",
            request.output_dimension,
            kind=self.kind_of(None, request.input_type),
            precisions=precisions,
            max_length=request.max_tokens,
            truncate=request.truncate != "NONE",
            left={"START": True, "END": False}.get(request.truncate),
        )

    def content(self, request: CohereRequest, embedded: Embedded, request_id: str) -> dict[str, Any]:
        embeddings = {}
        for name in request.types:
            precision, shown = TYPES[name]
            embeddings[name] = [shown(vector) for vector in embedded.results[precision].dense]
        return self._answer("embeddings_by_type", embeddings, request, embedded, request_id)

    def _answer(
        self, response_type: str, embeddings: Any, request: CohereRequest, embedded: Embedded, request_id: str
    ) -> dict[str, Any]:
        meta: dict[str, Any] = {"billed_units": {"input_tokens": sum(embedded.tokens)}}
        if embedded.truncated:
            meta["warnings"] = [cut_warning(embedded.truncated, len(request.texts), "texts", "texts[{}]".format)]
        return {
            "id": request_id,
            "response_type": response_type,
            "embeddings": embeddings,
            "texts": request.texts,
            "meta": meta,
        }


class CohereEmbedV1(CohereEmbed):
    """Without `embedding_types` the embeddings are a list."""

    paths = ("/v1/embed",)

    def content(self, request: CohereRequest, embedded: Embedded, request_id: str) -> dict[str, Any]:
        if request.embedding_types is not None:
            return super().content(request, embedded, request_id)
        vectors = [vector.tolist() for vector in embedded.results["float32"].dense]
        return self._answer("embeddings_floats", vectors, request, embedded, request_id)
