"""The keys of distillation: types, ranges and meanings.

Those of the question (language to no_token) are for causal language models that were not saved by this library. A
folder that was saved by it brings its own question, and then nothing here changes it.
"""

from collections.abc import Callable
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from rag_retrieval.core.config import NAMES, EngineOptions, EscapedText, ModelName, Only, OutputPath, key
from rag_retrieval.data.readers import DATASET_HELP, DatasetName, is_file
from rag_retrieval.models.options import ModelOptions
from rag_retrieval.models.prompts import PROMPTS, Prompt, check_places

HUB = Only("a dataset of the hub", lambda config: not is_file(config.dataset))


def _by_language(part: str) -> Callable[["DistillConfig"], str]:
    return lambda config: getattr(PROMPTS[config.language], part)


class DistillConfig(ModelOptions, EngineOptions):
    """The configuration of one run. The options for opening a model hold for every teacher."""

    main_keys: ClassVar = ("dataset", "teachers", "output", "max_length", "batch_size")
    groups: ClassVar = (
        EngineOptions.groups | ModelOptions.groups
        | {"dataset": "Data", "teachers": "Teachers", "batch_size": "Scoring"}
    )  # fmt: skip

    dataset: DatasetName = Field(min_length=1, description=f"The pairs to score: {DATASET_HELP}.")
    split: str = key("Split of a hub dataset.", "train", only=HUB, min_length=1)
    label_key: str = key("Key of the label in the data.", "label", min_length=1)
    output: OutputPath = Field(
        min_length=1,
        description="File to write, .jsonl: the records with teacher_score (a logit) and teacher_probability beside "
        "each label.",
    )
    overwrite: bool = key("Replace output where it exists. Otherwise that is refused.", False)

    teachers: Annotated[list[ModelName], NAMES] = Field(
        min_length=1,
        description="Rerankers, or causal language models that are asked yes or no: folders, hub names or "
        "package:NAME. The logits of several are averaged.",
    )
    language: Literal["en", "zh"] = key("Of the question that a language model is asked.", "en")
    system: EscapedText | None = key(
        "System text of the chat; empty for none. Default by language.", derive=_by_language("system")
    )
    instruction: EscapedText | None = key(
        "What stands where prompt says {instruction}. Default by language.", derive=_by_language("instruction")
    )
    prompt: EscapedText | None = key(
        "User text of the chat, with {query} and, after it, {document}. Default by language.",
        derive=_by_language("user"),
    )
    yes_token: str | None = key(
        "Answer for a relevant document, one token. Default yes, in Chinese 是.",
        derive=_by_language("yes_token"), min_length=1,
    )  # fmt: skip
    no_token: str | None = key(
        "The other answer. Default no, in Chinese 否.", derive=_by_language("no_token"), min_length=1
    )

    batch_size: int = key("Pairs of one forward pass at most; its tokens bound it besides.", 256, ge=1)
    pairs_per_part: int = key("Pairs that are scored and written together: what a killed run may lose.", 1024, ge=1)

    @property
    def question(self) -> Prompt:
        """What a language model is asked that is not known to be a reranker."""
        return Prompt(self.system, self.instruction, self.prompt, self.yes_token, self.no_token)

    @field_validator("teachers")
    @classmethod
    def _names_are_not_empty(cls, names: list[str]) -> list[str]:
        if not all(name.strip() for name in names):
            raise ValueError(f"expected the names of models, found an empty one in {names}")
        return names

    @field_validator("prompt")
    @classmethod
    def _has_its_places(cls, text: str) -> str:
        check_places(text)
        return text

    @field_validator("output")
    @classmethod
    def _is_json_lines(cls, name: str) -> str:
        if not name.endswith(".jsonl"):
            raise ValueError(f"expected a file that ends in .jsonl, found {name}")
        return name
