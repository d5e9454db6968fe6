"""The requests of text-embeddings-inference: `/embed`, `/embed_all`, `/embed_sparse`, `/similarity`, `/tokenize`."""

from itertools import chain, pairwise
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field, create_model
from pydantic_core import to_json
from starlette.responses import Response

from rag_retrieval.models.representations import LEXICAL, MULTI_VECTOR
from rag_retrieval.models.text_encoding import TextEncoder
from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.embedding import Embedded, EmbedTask
from rag_retrieval.serve.embedding_requests import (
    EmbeddingEndpoint,
    EmptyRequest,
    Inputs,
    inputs_of,
    limited_texts,
    listed,
)
from rag_retrieval.serve.endpoints import StrictRequest, Work, pieces_of
from rag_retrieval.serve.http import RequestError

ERROR_TYPES = {424: "Backend", 429: "Overloaded", 500: "Backend", 503: "Unhealthy", 504: "Backend"}


class CommonKeys(StrictRequest):
    prompt_name: str | None = None
    truncate: bool | None = None
    truncation_direction: Literal["left", "Left", "right", "Right"] | None = None

    @property
    def truncation(self) -> dict[str, Any]:
        """As `EmbedModel.task` takes it."""
        left = None if self.truncation_direction is None else self.truncation_direction.lower() == "left"
        return {"truncate": self.truncate is not False, "left": left}


class EmbedAllRequest(CommonKeys):
    """Of `/embed_sparse` too."""

    inputs: Inputs


class EmbedRequest(EmbedAllRequest):
    normalize: bool | None = None
    dimensions: int | None = Field(None, ge=1)


class SimilarityInputs(StrictRequest):
    source_sentence: str
    sentences: list[str]


class SimilarityRequest(StrictRequest):
    inputs: SimilarityInputs
    parameters: CommonKeys | None = None


class TokenizeRequest(StrictRequest):
    inputs: str | list[str]
    add_special_tokens: bool = True
    prompt_name: str | None = None


def tei_error_body(error: RequestError) -> dict[str, Any]:
    kind = "Empty" if isinstance(error, EmptyRequest) else ERROR_TYPES.get(error.status, "Validation")
    return {"error": error.message, "error_type": kind}


class TeiEndpoint(EmbeddingEndpoint):
    def error_body(self, error: RequestError, request_id: str) -> dict[str, Any]:
        return tei_error_body(error)


class Embed(TeiEndpoint):
    paths = ("/embed",)

    def body_schema(self, config: ServeConfig) -> tuple[type[EmbedRequest], dict[str, str]]:
        inputs = self.inputs_type(config)
        return create_model("Limited", __base__=EmbedRequest, inputs=(inputs, ...)), {"inputs": self.inputs_in_words}

    def task(self, request: EmbedRequest) -> EmbedTask:
        options = {"kind": self.kind_of(request.prompt_name), "normalize": request.normalize, **request.truncation}
        inputs = inputs_of(request.inputs, "inputs")
        return self.dense_task(inputs, listed("inputs"), "dimensions", request.dimensions, **options)

    def content(self, request: EmbedRequest, embedded: Embedded, request_id: str) -> list[list[float]]:
        return [vector.tolist() for vector in embedded.results["float32"].dense]


class EmbedAll(TeiEndpoint):
    """The token vectors of models that are trained for them: the bare states of other models mean nothing."""

    paths = ("/embed_all",)
    representation = MULTI_VECTOR

    def body_schema(self, config: ServeConfig) -> tuple[type[EmbedAllRequest], dict[str, str]]:
        inputs = self.inputs_type(config)
        return create_model("Limited", __base__=EmbedAllRequest, inputs=(inputs, ...)), {"inputs": self.inputs_in_words}

    def task(self, request: EmbedAllRequest) -> EmbedTask:
        self.check_gives(self.representation)
        options = {"kind": self.kind_of(request.prompt_name), "outputs": (self.representation,), **request.truncation}
        return self.model.task(inputs_of(request.inputs, "inputs"), listed("inputs"), **options)

    def content(self, request: EmbedAllRequest, embedded: Embedded, request_id: str) -> list[list[list[float]]]:
        return [vectors.tolist() for vectors in embedded.results["float32"].multi_vector]


class EmbedSparse(EmbedAll):
    """Lexical weights by token id."""

    paths = ("/embed_sparse",)
    representation = LEXICAL

    def content(self, request: EmbedAllRequest, embedded: Embedded, request_id: str) -> list[list[dict[str, Any]]]:
        found = embedded.results["float32"].lexical
        entries = [{"index": i, "value": w} for i, w in zip(found.ids.tolist(), found.weights.tolist(), strict=True)]
        return [entries[start:stop] for start, stop in pairwise(found.starts.tolist())]


class Similarity(TeiEndpoint):
    """Of a sentence with others, as the model compares vectors."""

    paths = ("/similarity",)

    def body_schema(self, config: ServeConfig) -> tuple[type[SimilarityRequest], dict[str, str]]:
        sentences = limited_texts(config)
        inputs = create_model("Inputs", __base__=SimilarityInputs, sentences=(sentences, ...))
        schema = create_model("Limited", __base__=SimilarityRequest, inputs=(inputs, ...))
        return schema, {"inputs": "an object with source_sentence, a text, and sentences, a list of texts"}

    def task(self, request: SimilarityRequest) -> EmbedTask:
        sentences, keys = inputs_of(request.inputs.sentences, "inputs.sentences"), request.parameters or CommonKeys()

        def place(position: int) -> str:
            return f"inputs.sentences[{position - 1}]" if position else "inputs.source_sentence"

        inputs, kind = [request.inputs.source_sentence, *sentences], self.kind_of(keys.prompt_name)
        return self.dense_task(inputs, place, "dimensions", None, kind=kind, **keys.truncation)

    def content(self, request: SimilarityRequest, embedded: Embedded, request_id: str) -> list[float]:
        vectors = embedded.results["float32"].dense
        return self.model.embedder.similarity(vectors[0], vectors[1:])[0].tolist()


# ---- tokens ---------------------------------------------------------------------------------------------


class Tokenize(TeiEndpoint):
    """Nothing is computed by the model."""

    paths = ("/tokenize",)
    batchers = ()

    def body_schema(self, config: ServeConfig) -> tuple[type[TokenizeRequest], dict[str, str]]:
        texts = Annotated[str | limited_texts(config), Field(union_mode="left_to_right")]
        schema = create_model("Limited", __base__=TokenizeRequest, inputs=(texts, ...))
        return schema, {"inputs": "a text or a list of texts"}

    def task(self, request: TokenizeRequest) -> EmbedTask:
        outputs = self.model.embedder.settings.representations[:1]
        inputs, kind = inputs_of(request.inputs, "inputs"), self.kind_of(request.prompt_name)
        return self.model.task(inputs, listed("inputs"), kind=kind, outputs=outputs)

    async def answer(self, parsed: tuple[TokenizeRequest, EmbedTask], work: Work) -> Response:
        request, task = parsed

        def tokens(piece: list[str]) -> list[bytes]:
            encoder = self.model.encoders[None]
            return [to_json(tokens_of(text, task.kind, encoder, request.add_special_tokens)) for text in piece]

        pieces = await work.encode(pieces_of(task.inputs), tokens)
        return Response(b"[" + b",".join(chain.from_iterable(pieces)) + b"]", media_type="application/json")


def tokens_of(text: str, kind: str | None, encoder: TextEncoder, add_special_tokens: bool) -> list[dict[str, Any]]:
    """The tokens of the prompt and the text, not cut; start and stop are bytes of both in UTF-8, which is what
    text-embeddings-inference gives."""
    text, tokenizer = encoder.prompt_for(kind) + text, encoder.fast_tokenizer
    byte_of = np.cumsum([0, *(len(character.encode()) for character in text)]).tolist()
    encoding = tokenizer.encode(text, add_special_tokens=False)
    tokens = [
        {"id": token, "text": text[start:stop], "special": False, "start": byte_of[start], "stop": byte_of[stop]}
        for token, (start, stop) in zip(encoding.ids, encoding.offsets, strict=True)
    ]
    if not add_special_tokens:
        return tokens
    prefix, suffix = (
        [
            {"id": token, "text": tokenizer.id_to_token(token), "special": True, "start": None, "stop": None}
            for token in ids
        ]
        for ids in (encoder.template.prefix, encoder.template.suffix)
    )
    return prefix + tokens + suffix
