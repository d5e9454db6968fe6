"""The keys of an embedder's configuration file, beside those that every trainer has."""

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from rag_retrieval.core.config import NAME_OR_NAMES, EscapedText, Only, key
from rag_retrieval.data.collection import is_beir_folder
from rag_retrieval.data.readers import DATASET_HELP, DatasetName
from rag_retrieval.metrics import PATTERNS, parse_metric
from rag_retrieval.train.config import HUB_VALIDATION, VALIDATED, TrainingConfig

SPLIT_VALIDATION = Only(
    "a val_dataset of the hub or in BEIR layout",
    lambda config: VALIDATED.applies(config) and (HUB_VALIDATION.applies(config) or is_beir_folder(config.val_dataset)),
)


class EmbeddingConfig(TrainingConfig):
    """The validated configuration of one run."""

    main_keys: ClassVar = ("model_name_or_path", "train_dataset", "loss_type", "output_dir")
    groups: ClassVar = TrainingConfig.groups | {"task": "Embedder", "train_dataset": "Data", "loss_type": "Loss"}

    # Embedder
    task: Literal["embedding"] = key("Which trainer the file is for.", "embedding")
    query_max_len: int = key("Longest query, in tokens, prompt and special tokens included.", 128, ge=4)
    passage_max_len: int = key("Longest document, likewise.", 512, ge=4)
    query_instruction: EscapedText | None = key("Text before each query. Default the model's own.")
    document_instruction: EscapedText | None = key("Text before each document. Default the model's own.")
    pooling: Literal["cls", "mean", "weighted_mean", "last"] | None = key(
        "How the states of a text's tokens become its vector. Default the model's own.")
    normalize: bool = key("Vectors of length 1, so that their product is the cosine.", True)
    max_tokens_with_graph: int | None = key(
        "Tokens of a step whose forward passes are kept for the backward pass, in each process; the others are done "
        "twice. Less memory, more time, the same result. Absent: a default of the device.", ge=0)

    # Data
    train_dataset: Annotated[DatasetName | list[DatasetName], NAME_OR_NAMES] = Field(
        min_length=1, description=f"Training data: {DATASET_HELP}, or a list of them, of which each step has one.")
    train_split: str = key("Split of a data set of the hub to train on.", "train", min_length=1)
    train_group_size: int = key(
        "A positive and the hard negatives of a query at most; more take turns.", 8, ge=1)
    shuffle: bool = key("Records in a new order in each epoch, otherwise in that of the file.", True)

    # Validation
    val_split: str | None = key(
        "Split to validate on. Default validation, and dev of a folder in BEIR layout.", only=SPLIT_VALIDATION,
        derive=lambda config: "dev" if is_beir_folder(config.val_dataset) else "validation", min_length=1)
    eval_on_start: bool | None = key(
        "Also validate before the first step, and compare every later figure with that one. Default true.",
        only=VALIDATED, derive=lambda config: True)
    metric_for_best_model: str | None = key(
        f"Validation figure that decides which checkpoint is best: loss, spearman (of graded pairs) or one of "
        f"{PATTERNS}. Default ndcg@10.", only=VALIDATED, derive=lambda config: "ndcg@10")

    # Loss
    loss_type: Literal["info_nce"] = key("The loss.", "info_nce")
    temperature: float = key("Divides cosines.", 0.02, gt=0)

    @field_validator("metric_for_best_model", mode="after")
    @classmethod
    def _known_metric(cls, name: str | None) -> str | None:
        if name not in (None, "loss", "spearman"):
            parse_metric(name)
        return name

    @property
    def train_files(self) -> list[str]:
        return self.train_dataset if isinstance(self.train_dataset, list) else [self.train_dataset]

    @classmethod
    def resolved_entries(cls, values: dict[str, Any]) -> list[dict[str, Any]]:
        files = values["train_dataset"]
        return [{"path": path} for path in (files if isinstance(files, list) else [files])]
