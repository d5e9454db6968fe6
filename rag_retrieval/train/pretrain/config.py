"""The keys of a pre-training's configuration file, beside those that every trainer has."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from rag_retrieval.core.config import NAME_OR_NAMES, FileOrFolder, Only, key
from rag_retrieval.data.documents import PASSAGE_TOKENS
from rag_retrieval.train.config import TrainingConfig

RETROMAE = Only("loss_type retromae", lambda config: config.loss_type == "retromae")
SPANS = Only("loss_type span_pairs", lambda config: config.loss_type == "span_pairs")
TEXTS = "a .txt, .md, .jsonl, .json (both also .gz) or .parquet file, a folder of texts, or one in BEIR layout"


class PretrainConfig(TrainingConfig):
    """A configuration of `task: pretrain`."""

    aliases: ClassVar = TrainingConfig.aliases | {
        "max_seq_length": "max_len", "mlm_probability": "encoder_mlm_probability",
        "bow_loss_weight": "bag_of_words_weight",
    }  # fmt: skip
    only_for: ClassVar = {"val_split": Only("other tasks", lambda config: False)}  # texts have no splits
    main_keys: ClassVar = ("model_name_or_path", "train_dataset", "loss_type", "batch_size", "output_dir")
    groups: ClassVar = TrainingConfig.groups | {"task": "Encoder", "train_dataset": "Data", "loss_type": "Loss"}

    # Encoder
    task: Literal["pretrain"] = key("Which trainer the file is for.", "pretrain")
    max_len: int = key("Longest text that the encoder reads, in tokens, special tokens included.", 512, ge=8)
    pooling: Literal["cls", "mean"] = key(
        "How the states of a span's tokens become its vector. retromae takes cls.", "cls", only=SPANS)

    # Data
    train_dataset: Annotated[FileOrFolder | list[FileOrFolder], NAME_OR_NAMES] = Field(
        min_length=1, description=f"Texts: {TEXTS}, or a list of them.")
    passage_tokens: int = key(
        "Words and marks of a passage at most (a character counts where a script has no spaces): longer documents are "
        "cut at the ends of paragraphs and sentences.", PASSAGE_TOKENS, ge=8)
    batch_size: int = key("Passages per process and micro-batch.", 32, ge=1)

    # Validation
    val_dataset: FileOrFolder | None = key(
        "Texts whose loss, in passes of the same masks, decides which checkpoint is best. Absent: no validation.")

    # Loss
    loss_type: Literal["retromae", "span_pairs"] = key(
        "What is learned beside masked tokens: to rebuild a passage from its vector, or to tell two spans of one "
        "passage from those of others.", "retromae")
    encoder_mlm_probability: float | None = key(
        "Share of the encoder's tokens that are masked. Default 0.3 for retromae, 0.15 for span_pairs.",
        derive=lambda config: 0.3 if config.loss_type == "retromae" else 0.15, gt=0, le=1)
    decoder_mlm_probability: float | None = key(
        "Share of a passage's tokens that each position of the decoder may not look at. Default 0.5.",
        only=RETROMAE, derive=lambda config: 0.5, ge=0, le=1)
    bag_of_words_weight: float = key(
        "Weight of the loss that predicts a passage's words from the states of its tokens (DupMAE). 0: without it.",
        0.0, only=RETROMAE, ge=0)
    temperature: float | None = key(
        "Divides cosines of spans. Default 0.05.", only=SPANS, derive=lambda config: 0.05, gt=0)

    @property
    def train_sources(self) -> list[str]:
        return self.train_dataset if isinstance(self.train_dataset, list) else [self.train_dataset]

    @classmethod
    def resolved_entries(cls, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        sources = values["train_dataset"]
        return [{"path": path} for path in (sources if isinstance(sources, list) else [sources])]
