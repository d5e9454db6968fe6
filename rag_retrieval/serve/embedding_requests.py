"""What requests for embeddings have in common: texts or token ids, names of prompts, and the way to an answer.

The requests and answers themselves are those of the services that are imitated: `embedding_openai`, `embedding_tei`,
`embedding_cohere`.
"""

import base64
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any, ClassVar

import numpy as np
from pydantic import Field
from pydantic_core import to_json
from starlette.responses import Response

from rag_retrieval.models.representations import DENSE
from rag_retrieval.serve.batching import Batcher
from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.embedding import (
    EMBEDDER,
    Embedded,
    EmbedItem,
    EmbedModel,
    EmbedTask,
    Input,
    Place,
    compute_texts,
)
from rag_retrieval.serve.endpoints import Endpoint, StrictRequest, Work, check_characters, limited_list, parse_json
from rag_retrieval.serve.http import RequestError, ServerMetrics

# what other services call the kinds of texts; the model's own names are taken besides
INPUT_TYPES = {"search_query": "query", "search_document": "document", "passage": "document"}

Inputs = str | list[int] | list[str | list[int]]


class EmptyRequest(RequestError):
    """A list of texts without any."""


class EmbeddingEndpoint(Endpoint):
    """A kind of request that is answered by the outputs of an embedder.

    A subclass says what its body may be (`body_schema`), what is to be computed (`task`), and how that is answered
    (`content`). statuses: those that its service has in the place of ours.
    """

    first = True
    statuses: ClassVar[dict[int, int]] = {}

    def __init__(self, config: ServeConfig, model: EmbedModel, batcher: Batcher, metrics: ServerMetrics):
        self.model, self.batcher, self.batchers = model, batcher, (batcher,)
        self.truncated = metrics.truncated.labels(EMBEDDER)
        self.max_characters = config.max_characters
        self.schema, self.expected = self.body_schema(config)

    def body_schema(self, config: ServeConfig) -> tuple[type[StrictRequest], dict[str, str]]:
        """The schema, with limits to its lists; and what its keys with texts hold, in words."""
        raise NotImplementedError

    def task(self, request: Any) -> EmbedTask:
        """Raises ValueError and RequestError for what the model cannot do."""
        raise NotImplementedError

    def content(self, request: Any, embedded: Embedded, request_id: str) -> Any:
        """The answer, as a JSON value."""
        raise NotImplementedError

    def parse(self, body: bytes, path: str) -> tuple[Any, EmbedTask]:
        with self.own_statuses():
            request = parse_json(body, self.schema, self.expected)
            try:
                task = self.task(request)
            except ValueError as error:
                raise RequestError(422, str(error)) from error
            placed = ((task.place(position), text) for position, text in enumerate(task.inputs))
            check_characters(placed, self.max_characters)
            return request, task

    def size(self, parsed: tuple[Any, EmbedTask]) -> int:
        return len(parsed[1].inputs)

    async def answer(self, parsed: tuple[Any, EmbedTask], work: Work) -> Response:
        request, task = parsed
        first = task.kind == "query"  # for which people wait
        with self.own_statuses():
            items, found = await compute_texts(self.model, self.batcher, task, work, first)
        body, truncated = await work.run(self._body, request, task, items, found, work.id, first=first)
        self.truncated.inc(truncated)
        headers = {"X-Truncated": str(truncated)} if truncated else None
        return Response(body, media_type="application/json", headers=headers)

    def _body(
        self, request: Any, task: EmbedTask, items: list[EmbedItem], found: list[dict[str, Any]], request_id: str
    ) -> tuple[bytes, int]:
        """In a thread, since a thousand vectors are a million numbers: the answer, and how many texts were cut."""
        embedded = self.model.embedded(task, items, found)
        return to_json(self.content(request, embedded, request_id)), len(embedded.truncated)

    @contextmanager
    def own_statuses(self) -> Iterator[None]:
        try:
            yield
        except RequestError as error:
            error.status = self.statuses.get(error.status, error.status)
            raise

    # ---- for subclasses ---------------------------------------------------------------------------------

    @property
    def inputs_in_words(self) -> str:
        return f"a text, a list of texts, a list of token ids (0 to {self.model.last_token}), or a list of such lists"

    def inputs_type(self, config: ServeConfig) -> Any:
        """`Inputs` with limits to its lists and ids."""
        token = Annotated[int, Field(ge=0, le=self.model.last_token)]
        ids = limited_list("ids", token, config.max_characters)
        each = Annotated[str | ids, Field(union_mode="left_to_right")]
        several = limited_list("several", each, config.max_documents)
        return Annotated[ids | several | str, Field(union_mode="left_to_right")]

    def dense_task(
        self, inputs: Sequence[Input], place: Place, dim_field: str, dim: int | None, **options
    ) -> EmbedTask:
        """options: of `EmbedModel.task`."""
        self.check_gives(DENSE)
        if dim is not None and dim > self.model.embedder.dim:
            most = f"this model's vectors have {self.model.embedder.dim} numbers, found {dim}"
            raise RequestError(422, f"{dim_field}: {most}")
        return self.model.task(inputs, place, dim=dim, **options)

    def check_gives(self, representation: str) -> None:
        own = self.model.embedder.settings.representations
        if representation not in own:
            raise RequestError(424, f"{self.model.name} gives {', '.join(own)}, and this asks for {representation}")

    def kind_of(self, prompt_name: str | None, input_type: str | None = None) -> str | None:
        """The kind of the texts by the keys of these names. Raises RequestError for one that the model does not have,
        and for both keys."""
        if prompt_name is not None and input_type is not None:
            raise RequestError(422, "expected prompt_name or input_type, found both; they say the same")
        field, name, kinds = "prompt_name", prompt_name, self.model.embedder.kinds
        if input_type is not None:
            field, name = "input_type", INPUT_TYPES.get(input_type, input_type)
        if name is not None and name not in kinds:
            known = (*INPUT_TYPES, *kinds) if field == "input_type" else kinds
            raise RequestError(422, f"{field}: this model has no prompt {name!r:.100}; it knows {', '.join(known)}")
        return name


def inputs_of(value: Inputs, field: str) -> list[Input]:
    """Raises EmptyRequest."""
    if isinstance(value, str):
        return [value]
    if not value:
        raise EmptyRequest(400, f"{field}: expected at least one text, found none")
    if isinstance(value[0], int):
        return [tuple(value)]
    return [each if isinstance(each, str) else tuple(each) for each in value]


def limited_texts(config: ServeConfig) -> Any:
    return limited_list("texts", str, config.max_documents)


def listed(field: str) -> Place:
    return (field + "[{}]").format


def base64_of(vector: np.ndarray) -> str:
    """Float32, little-endian."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()
