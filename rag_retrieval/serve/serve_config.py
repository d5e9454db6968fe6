"""What the server can be told, from a YAML file and from options: the same keys, and options win.

Easy to get wrong: the token is no key, since a command line is seen by every user of the machine. It comes from a
file (`token_file`) or from the environment (`RAG_RETRIEVAL_SERVE_TOKEN`).

Nothing here imports torch: a wrong option must be reported before anything heavy is loaded.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator, model_validator

from rag_retrieval.core.config_schema import ABSENT, Schema, problem

TOKEN_VARIABLE = "RAG_RETRIEVAL_SERVE_TOKEN"


class ServeConfig(BaseModel):
    """One server. Frozen; types are strict. Raises pydantic.ValidationError with every problem of the given values at
    once."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(min_length=1, description="Folder, hub name, or package:NAME of the reranker.")
    name: str | None = Field(None, min_length=1, description="What answers call it. Absent: the folder's name.")
    host: str = Field(
        "127.0.0.1",
        min_length=1,
        description="Address to listen on. The default is seen from this machine alone; 0.0.0.0 is seen from "
        "everywhere: set a token then.",
    )
    port: int = Field(8080, ge=0, le=65535, description="Port to listen on; 0 takes a free one and logs it.")
    token_file: str | None = Field(
        None,
        min_length=1,
        description="File whose one line is the bearer token that requests must bring. Absent: the token is in the "
        f"environment as {TOKEN_VARIABLE}, or none is asked for.",
    )
    max_len: int | None = Field(
        None, ge=16, description="Longest pair, in tokens; what is longer is cut. Absent: the model's own."
    )
    long_document: Literal["truncate", "max_slice", "mean_slice", "first_slice"] = Field(
        "truncate",
        description="What becomes of a document that does not fit beside the query: its beginning is read, or it is "
        "cut into slices, of which the best score, the mean or the first one's counts.",
    )
    device: str | None = Field(
        None, min_length=1, description="Such as cpu or cuda:0. Absent: a GPU where there is one."
    )
    precision: Literal["fp32", "bf16", "fp16"] | None = Field(
        None, description="Of the computation. Absent: half precision on a GPU, fp32 on a CPU."
    )
    batch_tokens: int | None = Field(
        None,
        ge=16,
        description="Tokens, over the pairs of all requests, that are scored together at most. What comes in "
        "meanwhile waits for them. Absent: as many as are scored in 0.2 s, measured at the start.",
    )
    max_documents: int = Field(1000, ge=1, description="Documents of a request; more are refused with 422.")
    max_characters: int = Field(
        100_000, ge=1, description="Characters of a query or of a document; a longer one is refused with 422."
    )
    max_body_bytes: int = Field(4_194_304, ge=1, description="Bytes of a request's body; more are refused with 413.")
    queue_requests: int = Field(
        256, ge=1, description="Requests inside, from their first byte to their answer; more are refused with 429."
    )
    queue_pairs: int = Field(
        4096, ge=1, description="Documents of all requests inside, at least max_documents; more are refused with 429."
    )
    timeout: float = Field(
        30.0,
        gt=0,
        description="Seconds from a request's first byte to its answer; later it is dropped with 504. New ones are "
        "refused with 429 while what waits will take more than half of it.",
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_absent(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value not in ABSENT or key not in cls.model_fields}

    @field_validator("queue_pairs")
    @classmethod
    def _room_for_a_request(cls, value: int, info: ValidationInfo) -> int:
        documents = info.data.get("max_documents", 1)
        if value < documents:
            raise problem(f"expected at least max_documents, which is {documents}, found {value}")
        return value


SERVE = Schema(ServeConfig, "model: runs/my/model", models=("model",), paths=("token_file",))
