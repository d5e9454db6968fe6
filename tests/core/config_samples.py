"""A configuration with a key of each kind."""

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from rag_retrieval.core.config import (
    NAME_OR_NAMES,
    NAMES,
    Config,
    EscapedText,
    FileOrFolder,
    FolderPath,
    Location,
    ModelName,
    Only,
    OutputPath,
    key,
)
from rag_retrieval.data.readers import DatasetName, is_file_name

DECODER = Only("kind decoder", lambda config: config.kind == "decoder")


class Sample(Config):
    aliases: ClassVar = {"epoch": "epochs"}
    main_keys: ClassVar = ("model", "lr")
    groups: ClassVar = {"model": "Model", "epochs": "Steps", "train": "Files"}

    model: ModelName = Field(min_length=1, description="Of what.")
    kind: Literal["encoder", "decoder", "no"] = key("Kind of model.", "encoder")
    seq: EscapedText | None = key("Between texts.", only=DECODER, derive=lambda config: "\n")
    epochs: int = key("Passes.", 1, ge=1)
    lr: float = key("Learning rate.", 5e-5, gt=0)
    head_lr: float | None = key("Of the head.", derive=lambda config: 10 * config.lr, gt=0)
    max_norm: float | None = key("None: no clipping.", 1.0, gt=0, lt=10)
    save: bool = key("Whether to save.", True)
    train: Annotated[str | list[str | dict[str, Any]], NAME_OR_NAMES] = key("Training data.", "owner/data")
    val: DatasetName | None = key("Validation data.", min_length=1)
    teachers: Annotated[list[ModelName], NAMES] = key("Models.", [])
    folder: FolderPath | None = key("A folder.")
    beside: FileOrFolder | None = key("Either.")
    split: Annotated[str, Location(file=True, is_file_name=is_file_name, only_files=True)] | None = key("Or a file.")
    resume: Annotated[str, Location(folder=True, words=("auto",))] | None = key("A run.")
    output_dir: OutputPath = key("Where to.", "out", min_length=1)

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.lr * self.epochs > 1:
            yield "lr", f"expected at most 1 over all {{epochs}}, found {self.lr * self.epochs:g}"
        if self.val == "owner/same":
            yield "val", "is the training data"
