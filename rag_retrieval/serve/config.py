"""The keys of the server.

There is no key for the token, since a command line is visible to every user of the machine. It comes
from a file (`token_file`) or from the environment (`RAG_RETRIEVAL_SERVE_TOKEN`).
"""

from collections.abc import Iterator
from typing import ClassVar

from pydantic import Field

from rag_retrieval.core.config import FileOrFolder, ModelName, key
from rag_retrieval.models.options import LongDocumentOptions, ModelOptions

TOKEN_VARIABLE = "RAG_RETRIEVAL_SERVE_TOKEN"


class ServeConfig(ModelOptions, LongDocumentOptions):
    """One server."""

    main_keys: ClassVar = ("model", "host", "port", "token_file", "long_document")
    groups: ClassVar = {
        "long_document": "Long documents",
        "model_type": "Model",
        "model": "Model",
        "host": "Address",
        "batch_tokens": "Limits",
    }

    model: ModelName = Field(min_length=1, description="Folder, hub name, or package:NAME of the reranker.")
    name: str | None = key("What answers call it. Absent: the folder's name.", min_length=1)
    host: str = key(
        "Address to listen on. The default is seen from this machine alone; 0.0.0.0 is seen from everywhere: set a "
        "token then.",
        "127.0.0.1",
        min_length=1,
    )
    port: int = key("Port to listen on; 0 takes a free one and logs it.", 8080, ge=0, le=65535)
    token_file: FileOrFolder | None = key(
        "File whose one line is the bearer token that requests must bring. Absent: the token is in the environment as "
        f"{TOKEN_VARIABLE}, or none is asked for.",
        min_length=1,
    )
    batch_tokens: int | None = key(
        "Tokens, over the pairs of all requests, that are scored together at most. What comes in meanwhile waits for "
        "them. Absent: as many as are scored in 0.2 s, measured at the start.",
        ge=16,
    )
    max_documents: int = key("Documents of a request; more are refused with 422.", 1000, ge=1)
    max_characters: int = key(
        "Characters of a query or of a document; a longer one is refused with 422.", 100_000, ge=1
    )
    max_body_bytes: int = key("Bytes of a request's body; more are refused with 413.", 4_194_304, ge=1)
    queue_requests: int = key(
        "Requests inside, from their first byte to their answer; more are refused with 429.", 256, ge=1
    )
    queue_pairs: int = key(
        "Documents of all requests inside, at least max_documents; more are refused with 429.", 4096, ge=1
    )
    timeout: float = key(
        "Seconds from a request's first byte to its answer; later it is dropped with 504. New ones are refused with "
        "429 while they would wait for their turn for more than half of it.",
        30.0,
        gt=0,
        le=86_400,
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.queue_pairs < self.max_documents:
            yield (
                "queue_pairs",
                f"expected at least max_documents, which is {self.max_documents}, found {self.queue_pairs}",
            )
