"""What `rag-retrieval distill` can be told: every key with its type, range and meaning.

Easy to get wrong: the keys of the question (language to no_token) are for causal language models that were not saved
by this library. A folder that was saved by it brings its own question, and then nothing here changes it.

Nothing here imports torch: a wrong configuration must be reported before anything heavy is loaded.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rag_retrieval.core.config_schema import ABSENT, Schema, problem
from rag_retrieval.models.prompts import PROMPTS, check_places

QUESTION = ("system", "instruction", "prompt", "yes_token", "no_token")  # in the order of a Prompt


class DistillConfig(BaseModel):
    """The validated configuration of one run. Frozen; types are strict."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    dataset: str = Field(min_length=1, description="The pairs to score: a training file or a hub dataset.")
    split: str = Field("train", min_length=1, description="Split of a hub dataset.")
    label_key: str = Field("label", min_length=1, description="Key of the label in the data.")
    output: str = Field(
        min_length=1,
        description="File to write, .jsonl: the records with teacher_score (a logit) and "
        "teacher_probability beside each label.",
    )
    overwrite: bool = Field(False, description="Replace output where it exists. Otherwise that is refused.")

    teachers: list[str] | str = Field(
        min_length=1,
        description="Rerankers, or causal language models that are asked yes or no: folders, hub names "
        "or package:NAME. The logits of several are averaged.",
    )
    max_len: int | None = Field(
        None, ge=16, description="Longest pair, in tokens. Absent: as each teacher was saved, else 512."
    )
    language: Literal["en", "zh"] = Field("en", description="Of the question that a language model is asked.")
    system: str | None = Field(None, description="System text of the chat; empty for none. Default by language.")
    instruction: str | None = Field(
        None, description="What stands where prompt says {instruction}. Default by language."
    )
    prompt: str | None = Field(
        None, description="User text of the chat, with {query} and, after it, {document}. Default by language."
    )
    yes_token: str | None = Field(
        None, min_length=1, description="Answer for a relevant document, one token. Default yes, in Chinese 是."
    )
    no_token: str | None = Field(None, min_length=1, description="The other answer. Default no, in Chinese 否.")

    batch_size: int = Field(256, ge=1, description="Pairs of one forward pass at most; its tokens bound it besides.")
    dtype: Literal["float32", "bfloat16", "float16"] = Field(
        "float32", description="Of the teachers' weights. On a GPU float32 weights compute in half precision."
    )
    pairs_per_part: int = Field(
        1024, ge=1, description="Pairs that are scored and written together: what a killed run may lose."
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with a teacher.")

    @model_validator(mode="before")
    @classmethod
    def _fill_in(cls, data: Any) -> Any:
        """Absent keys are left out; those of the question follow the language, where it is known."""
        given = {key: value for key, value in data.items() if value not in ABSENT or key not in cls.model_fields}
        defaults = PROMPTS.get(given.get("language", "en"))
        question = {} if defaults is None else dict(zip(QUESTION, defaults, strict=True))
        return question | given

    @field_validator("teachers")
    @classmethod
    def _several(cls, names: list[str] | str) -> list[str]:
        names = [names] if isinstance(names, str) else names
        if not names or not all(name.strip() for name in names):
            raise problem(f"expected the names of models, found an empty one in {names}")
        return names

    @field_validator("prompt")
    @classmethod
    def _has_its_places(cls, text: str) -> str:
        try:
            check_places(text)
        except ValueError as error:
            raise problem(str(error)) from error
        return text

    @field_validator("output")
    @classmethod
    def _is_json_lines(cls, name: str) -> str:
        if not name.endswith(".jsonl"):
            raise problem(f"expected a file that ends in .jsonl, found {name}")
        return name


DISTILLING = Schema(
    DistillConfig,
    "dataset: train.jsonl",
    models=("teachers",),
    datasets=("dataset",),
    outputs=("output",),
    escaped=("system", "instruction", "prompt"),
)
