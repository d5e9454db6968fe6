"""The keys of the server.

There is no key for the token, since a command line is visible to every user of the machine. It comes
from a file (`token_file`) or from the environment (`RAG_RETRIEVAL_SERVE_TOKEN`).
"""

from collections.abc import Iterator
from typing import ClassVar

from rag_retrieval.core.config import FileOrFolder, FolderPath, ModelName, Only, key
from rag_retrieval.models.options import LongDocumentOptions, ModelOptions, OpeningOptions
from rag_retrieval.retrieval.config import DEPTH

TOKEN_VARIABLE = "RAG_RETRIEVAL_SERVE_TOKEN"
RERANKER = Only("servers with model", lambda config: config.model is not None)
EMBEDDER = Only("servers with embedder", lambda config: config.embedder is not None)
INDEX = Only("servers with index", lambda config: config.index is not None)
EITHER = Only("servers with model or embedder", lambda config: config.model or config.embedder)


class ServeConfig(ModelOptions, LongDocumentOptions):
    """One server."""

    main_keys: ClassVar = ("model", "embedder", "index", "host", "port")
    groups: ClassVar = {
        "long_document": "Long documents",
        "device": "Opening the models",
        "model": "Models",
        "host": "Address",
        "batch_tokens": "Limits",
    }

    only_for: ClassVar = (
        dict.fromkeys(ModelOptions.model_fields.keys() | LongDocumentOptions.model_fields.keys(), RERANKER)
        | dict.fromkeys((*OpeningOptions.model_fields, "model_type"), EITHER)
        | {"device": None, "trust_remote_code": None}
    )

    model: ModelName | None = key("Folder, hub name, or package:NAME of a reranker.", min_length=1)
    embedder: ModelName | None = key("Folder, hub name, or package:NAME of an embedder.", min_length=1)
    index: FolderPath | None = key("Folder that rag-retrieval index wrote, to search in.", min_length=1)
    depth: int = key(
        "Documents that each stage of a search finds, and that are reranked; top_k where that is more.", DEPTH,
        only=INDEX, ge=1,
    )  # fmt: skip
    name: str | None = key("What answers call the reranker. Absent: its folder's name.", only=RERANKER, min_length=1)
    embedder_name: str | None = key(
        "What answers call the embedder. Absent: its folder's name.", only=EMBEDDER, min_length=1
    )
    host: str = key(
        "Address to listen on. The default is seen from this machine alone; 0.0.0.0 is seen from everywhere: set a "
        "token then.",
        "127.0.0.1",
        min_length=1,
    )
    port: int = key("Port to listen on; 0 takes a free one and logs it.", 8080, ge=0, le=65535)
    workers: int = key(
        "Processes that share the port, each with models of its own, where there are cores for them. All limits below "
        "are those of one process.",
        1,
        ge=1,
        le=1024,
    )
    token_file: FileOrFolder | None = key(
        "File whose one line is the bearer token that requests must bring. Absent: the token is in the environment as "
        f"{TOKEN_VARIABLE}, or none is asked for.",
        min_length=1,
    )
    batch_tokens: int | None = key(
        "Tokens, over the texts of all requests, that a model computes together at most. What comes in meanwhile waits "
        "for them. Absent: as many as it computes in 0.2 s, measured at the start.",
        ge=16,
    )
    max_documents: int = key("Documents or texts of a request; more are refused with 422.", 1000, ge=1)
    max_queries: int = key("Queries of a search; more are refused with 422.", 32, only=INDEX, ge=1)
    max_characters: int = key(
        "Characters of a query, document or text; a longer one is refused with 422.", 100_000, ge=1
    )
    max_body_bytes: int = key("Bytes of a request's body; more are refused with 413.", 4_194_304, ge=1)
    queue_requests: int = key(
        "Requests inside, from their first byte to their answer; more are refused with 429.", 256, ge=1
    )
    queue_pairs: int = key(
        "Documents, texts and queries of all requests inside, at least max_documents; more are refused with 429.",
        4096,
        ge=1,
    )
    timeout: float = key(
        "Seconds from a request's first byte to its answer; later it is dropped with 504. New ones are refused with "
        "429 while they would wait for their turn for more than half of it.",
        30.0,
        gt=0,
        le=86_400,
    )

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.model is None and self.embedder is None and self.index is None:
            yield "model", "is missing; give model (a reranker), embedder, index, or several of them"
        if self.queue_pairs < self.max_documents:
            yield (
                "queue_pairs",
                f"expected at least max_documents, which is {self.max_documents}, found {self.queue_pairs}",
            )
        elif self.index is not None and self.model is not None and self.queue_pairs < self.depth:
            yield "queue_pairs", f"expected at least depth, which is {self.depth}, found {self.queue_pairs}"
