"""OpenAI's embeddings: `/v1/embeddings`."""

from typing import Any, ClassVar, Literal

from pydantic import Field, create_model

from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.embedding import Embedded, EmbedTask
from rag_retrieval.serve.embedding_requests import (
    EmbeddingEndpoint,
    Inputs,
    base64_of,
    inputs_of,
    listed,
)
from rag_retrieval.serve.endpoints import StrictRequest
from rag_retrieval.serve.http import RequestError


class OpenAIRequest(StrictRequest):
    """prompt_name, input_type and truncate are ours: OpenAI's models have one kind of text, and refuse long ones."""

    input: Inputs
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = Field(None, ge=1)
    prompt_name: str | None = None
    input_type: str | None = None
    truncate: bool | None = None
    # known, and without an influence on the result
    model: str | None = None
    user: str | None = None


class OpenAIEmbeddings(EmbeddingEndpoint):
    paths = ("/v1/embeddings",)
    statuses: ClassVar = {422: 400, 424: 400}

    def body_schema(self, config: ServeConfig) -> tuple[type[OpenAIRequest], dict[str, str]]:
        inputs = self.inputs_type(config)
        return create_model("Limited", __base__=OpenAIRequest, input=(inputs, ...)), {"input": self.inputs_in_words}

    def task(self, request: OpenAIRequest) -> EmbedTask:
        kind, truncate = self.kind_of(request.prompt_name, request.input_type), request.truncate is not False
        inputs, place = inputs_of(request.input, "input"), listed("input")
        return self.dense_task(inputs, place, "dimensions", request.dimensions, kind=kind, truncate=truncate)

    def content(self, request: OpenAIRequest, embedded: Embedded, request_id: str) -> dict[str, Any]:
        shown = base64_of if request.encoding_format == "base64" else lambda vector: vector.tolist()
        tokens = sum(embedded.tokens)
        return {
            "object": "list",
            "data": [
                {"object": "embedding", "index": index, "embedding": shown(vector)}
                for index, vector in enumerate(embedded.results["float32"].dense)
            ],
            "model": self.model.name,
            "usage": {"prompt_tokens": tokens, "total_tokens": tokens},
        }

    def error_body(self, error: RequestError, request_id: str) -> dict[str, Any]:
        kind, code = "server_error" if error.status >= 500 else "invalid_request_error", None
        if error.status == 401:
            code = "invalid_api_key"
        elif error.status == 429:
            kind, code = "requests", "rate_limit_exceeded"
        return {"error": {"message": error.message, "type": kind, "param": None, "code": code}}
