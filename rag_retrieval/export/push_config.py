"""What `rag-retrieval push` can be told. Nothing here imports torch or huggingface_hub.

Easy to get wrong: there is no key for a token. It would stand in the list of processes and in the shell's history.
"""

from typing import Any

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rag_retrieval.core.config_schema import ABSENT, Schema, problem

LISTS = ("language", "evaluations")


class PushConfig(BaseModel):
    """One upload. Frozen; types are strict."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="Folder of the model.")
    repo_id: str = Field(min_length=1, description="Where to: ORGANISATION/NAME.")
    private: bool = Field(True, description="Whether a repository that is made now is private.")
    language: tuple[str, ...] = Field((), description="Languages for the card, by their codes: en,zh.")
    license: str | None = Field(None, min_length=1, description="The licence for the card, by the hub's id: mit.")
    evaluations: tuple[str, ...] = Field(
        (), description="Folders that `rag-retrieval evaluate` wrote for this model; their figures join the card."
    )
    commit_message: str = Field("Upload a reranker", min_length=1, description="Of the commit on the hub.")
    dry_run: str | None = Field(
        None, min_length=1, description="A new folder, which gets what would be uploaded; nothing is sent."
    )

    @model_validator(mode="before")
    @classmethod
    def _leave_out_absent(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value not in ABSENT or key not in cls.model_fields}

    @field_validator(*LISTS, mode="before")
    @classmethod
    def _as_tuple(cls, value: Any) -> Any:
        return tuple(value) if isinstance(value, list) else value

    @field_validator("dry_run")
    @classmethod
    def _names_a_folder(cls, value: str | None) -> str | None:
        if value is not None and value.lower() in ("true", "false"):
            raise problem(f"expected a folder to write to, found {value}; for example look")
        return value


PUSH = Schema(PushConfig, "model: runs/my/model", folders=("model",), paths=("evaluations",), outputs=("dry_run",))
