"""The keys of an embedder's configuration file, beside those that every trainer has.

The names of losses and the keys of their options come from the table of losses, `EMBEDDING_LOSSES`.
"""

import sys
from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self, get_origin

from pydantic import BeforeValidator, Field, ModelWrapValidatorHandler, create_model, field_validator, model_validator

from rag_retrieval.core.config import (
    NAME_OR_NAMES,
    NAMES,
    EscapedText,
    Location,
    ModelName,
    Only,
    failure,
    key,
    shown_value,
)
from rag_retrieval.data.collection import is_beir_folder
from rag_retrieval.data.readers import DATASET_HELP, DatasetName
from rag_retrieval.losses.custom import OWN_LOSS
from rag_retrieval.losses.embedding import EMBEDDING_ALIASES, EMBEDDING_LOSSES, EmbeddingLoss
from rag_retrieval.metrics import PATTERNS, parse_metric
from rag_retrieval.models.options import POOLINGS
from rag_retrieval.train.config import HUB_VALIDATION, VALIDATED
from rag_retrieval.train.embedding.other_trainers import ALIASES, POOLING_NAMES, translate
from rag_retrieval.train.embedding.representation_keys import DENSE, RepresentationKeys, split_metric

SPLIT_VALIDATION = Only(
    "a val_dataset of the hub or in BEIR layout",
    lambda config: VALIDATED.applies(config) and (HUB_VALIDATION.applies(config) or is_beir_folder(config.val_dataset)),
)
DEFAULT_WIDTHS = (64, 128, 256, 512, 768)
WHOLE_VECTOR = sys.maxsize  # a width, which the objective cuts to the model's
TEACHER_LOSSES = [name for name, loss in EMBEDDING_LOSSES.items() if loss.reads == "teacher_score"]
OPTIONS = {option.name: option for loss in EMBEDDING_LOSSES.values() for option in loss.options}


def _reads(what: str) -> Any:
    return lambda config: any(loss.reads == what for loss in config.losses)


def _default_metric(config: "EmbeddingKeys") -> str:
    graded = config.record_kind == "label" and not is_beir_folder(config.val_dataset)
    return "spearman" if graded else "ndcg@10"


def _reads_other_records(config: "EmbeddingKeys") -> bool:
    alone = getattr(config, "use_inbatch_neg", None) is False
    return any(
        not loss.own_texts and not (alone and "use_inbatch_neg" in {option.name for option in loss.options})
        for loss in config.losses
    )


TEACHER_LOSS = Only("runs with teacher_loss_type", lambda config: config.teacher_loss_type is not None)
TEACHER_SCORES = Only("losses that learn from teacher scores", lambda config: config.reads_teacher)
VECTORS = Only("losses that learn a teacher's vectors", _reads("teacher_vectors"))
GROUPS = Only("losses that learn from positives", lambda config: config.record_kind == "positives")
IN_BATCH = Only("losses that compare with other records' texts", _reads_other_records)
GUIDED = Only(
    "false_negative_judge guide", lambda config: getattr(config, "false_negative_judge", None) == "guide"
)
MATRYOSHKA = Only("runs with use_mrl", lambda config: config.use_mrl)


class EmbeddingKeys(RepresentationKeys):
    """All keys but the options of losses; `EmbeddingConfig` has these too."""

    aliases: ClassVar = RepresentationKeys.aliases | ALIASES
    validation_keys: ClassVar = RepresentationKeys.validation_keys | {"train_label_key"}
    main_keys: ClassVar = ("model_name_or_path", "train_dataset", "loss_type", "batch_size", "output_dir")
    groups: ClassVar = RepresentationKeys.groups | {"task": "Embedder", "train_dataset": "Data", "loss_type": "Loss"}

    # Embedder
    task: Literal["embedding"] = key("Which trainer the file is for.", "embedding")
    query_max_len: int | None = key(
        "Longest query, in tokens, prompt and special tokens included. Default 128, and 32 with query_expansion.",
        derive=lambda config: 32 if config.expands_queries else 128, ge=4)
    passage_max_len: int = key("Longest document, likewise.", 512, ge=4)
    query_instruction: EscapedText | None = key("Text before each query. Default the model's own.")
    document_instruction: EscapedText | None = key("Text before each document. Default the model's own.")
    pooling: Annotated[Literal[POOLINGS], BeforeValidator(lambda name: POOLING_NAMES.get(name, name))] | None = key(
        "How the states of a text's tokens become its vector. Default the model's own.", only=DENSE)
    include_prompt: bool | None = key(
        "Whether the tokens of instructions are pooled too. Default the model's own.", only=DENSE)
    cls_interval: int | None = key(
        "Pooling cls: another cls after every so many tokens of a text, and their mean. Absent: one.",
        only=DENSE, ge=2)
    bidirectional: bool | None = key(
        "Decoders: whether tokens see those after them, as in an encoder. Default the model's own.")
    normalize: bool = key("Vectors of length 1, so that their product is the cosine.", True, only=DENSE)
    max_tokens_with_graph: int | None = key(
        "Tokens of a step whose forward passes are kept for the backward pass, in each process; the others are done "
        "twice. Less memory, more time, the same result. Absent: a default of the device.", ge=0)

    # Data
    train_dataset: Annotated[DatasetName | list[DatasetName], NAME_OR_NAMES] = Field(
        min_length=1, description=f"Training data: {DATASET_HELP}, or a list of them, of which each step has one.")
    train_split: str = key("Split of a data set of the hub to train on.", "train", min_length=1)
    train_label_key: str = key("Key of the label in training data.", "label", min_length=1)
    train_dataset_vec: Annotated[list[Annotated[str, Location(file=True)]] | None, NAMES] = key(
        "Raw file of a teacher's vectors, float32, one row for each text of train_dataset; one for each file.",
        only=VECTORS, min_length=1)
    teacher_embedding_dim: int | None = key(
        "Width of the teacher's vectors. Where the model's is another, a projection is added.", only=VECTORS, ge=1)
    train_group_size: int = key(
        "Documents of a query in a step at most: a positive and hard negatives, which take turns.", 8,
        only=GROUPS, ge=1)
    max_example_num_per_dataset: int | None = key(
        "Train on a random sample of so many records of each file. Absent: on all.", ge=1)
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
        f"{PATTERNS}; with several representations of their ensemble, and lexical/ndcg@10 of one of them. Default "
        "ndcg@10; spearman for a loss on graded pairs, where val_dataset has them.",
        only=VALIDATED, derive=_default_metric)

    # Loss
    loss_type: str = key(
        f"What is learned. One of {', '.join(EMBEDDING_LOSSES)}, or a function of your own, my_package.losses:my_loss.",
        "info_nce")
    teacher_loss_type: str | None = key(
        f"Second loss, on teacher scores, beside loss_type: one of {', '.join(TEACHER_LOSSES)}.")
    teacher_weight: float | None = key(
        "Weight of teacher_loss_type; loss_type has the rest of 1. Default 0.5.", only=TEACHER_LOSS,
        derive=lambda config: 0.5, ge=0, le=1)
    teacher_score_key: Annotated[str | list[str] | None, NAME_OR_NAMES] = key(
        "Key of the teacher's score; in records of pos and neg it is pos_scores and neg_scores. Default teacher_score. "
        "Several keys: of several teachers, whose scores are averaged once each has the same mean entropy.",
        only=TEACHER_SCORES, derive=lambda config: "teacher_score", min_length=1)
    guide_model: ModelName | None = key(
        "Embedding model whose cosines decide what is a false negative. Its vectors of all texts are computed "
        "before the first step and kept in the cache.", only=GUIDED, min_length=1)
    negatives_cross_device: bool | None = key(
        "The texts of all processes are negatives of a query, otherwise those of its own process alone. Default true.",
        only=IN_BATCH, derive=lambda config: True)
    use_mrl: bool = key(
        "Matryoshka: the loss is taken over several widths, so that vectors can be cut.", False, only=DENSE)
    mrl_dims: Annotated[list[int] | None, NAMES] = key(
        "Widths of use_mrl. One beyond the model's adds a projection to that width. Absent: 64, 128, 256, 512 and 768 "
        "as far as the model's, and the model's own.", only=MATRYOSHKA, min_length=1)
    mrl_weights: Annotated[list[float] | None, NAMES] = key(
        "Weight of the loss at each width. Absent: their mean. Without mrl_dims: of 64, 128, 256, 512 and 768 alone.",
        only=MATRYOSHKA, min_length=1)

    @field_validator("metric_for_best_model", mode="after")
    @classmethod
    def _known_metric(cls, name: str | None) -> str | None:
        if name not in (None, "loss", "spearman"):
            parse_metric(split_metric(name)[1])
        return name

    @model_validator(mode="wrap")
    @classmethod
    def _translate(cls, given: Any, handler: ModelWrapValidatorHandler[Self]) -> Self:
        values, problems, unused = translate(given)
        if problems:
            raise failure(cls, problems, given)
        config = handler(values)
        config._ignored.update(unused)
        return config

    @property
    def train_files(self) -> list[str]:
        return self.train_dataset if isinstance(self.train_dataset, list) else [self.train_dataset]

    @property
    def teacher_key(self) -> str | tuple[str, ...] | None:
        """For `RecordRules`."""
        return tuple(self.teacher_score_key) if isinstance(self.teacher_score_key, list) else self.teacher_score_key

    @property
    def loss_weights(self) -> dict[str, float]:
        """By name, for `objective_of`."""
        if self.teacher_loss_type is None:
            return {self.loss_type: 1.0}
        return {self.loss_type: 1 - self.teacher_weight, self.teacher_loss_type: self.teacher_weight}

    @property
    def losses(self) -> list[EmbeddingLoss]:
        names = [name for name in (self.loss_type, self.teacher_loss_type) if name is not None]
        return [EMBEDDING_LOSSES.get(name) or EmbeddingLoss(name, name) for name in names]

    @property
    def widths(self) -> list[int] | None:
        """Of Matryoshka, for `objective_of`, which cuts them to the model's; None without it."""
        if not self.use_mrl:
            return None
        return self.mrl_dims or [*DEFAULT_WIDTHS, *([] if self.mrl_weights else [WHOLE_VECTOR])]

    @property
    def width_weights(self) -> list[float] | None:
        return self.mrl_weights if self.use_mrl else None

    @property
    def record_kind(self) -> Literal["positives", "label", "teacher_vectors"]:
        """See `training_data.RecordKind`."""
        reads = self.losses[0].reads
        return "positives" if reads == "teacher_score" else reads

    @property
    def reads_teacher(self) -> bool:
        judged = getattr(self, "false_negative_judge", None) == "teacher"
        return judged or any(loss.reads == "teacher_score" for loss in self.losses)

    @property
    def loss_options(self) -> dict[str, Any]:
        """The options of the losses that are given, for `objective_of`."""
        names = {option.name for loss in self.losses for option in loss.options}
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @classmethod
    def resolved_entries(cls, values: dict[str, Any]) -> list[dict[str, Any]]:
        files = values["train_dataset"]
        return [{"path": path} for path in (files if isinstance(files, list) else [files])]

    @field_validator("loss_type", "teacher_loss_type", mode="after")
    @classmethod
    def _known_loss(cls, name: str | None, info) -> str | None:
        name = EMBEDDING_ALIASES.get(name, name)
        may_be_own = info.field_name == "loss_type"
        known = EMBEDDING_LOSSES if may_be_own else TEACHER_LOSSES
        if name is not None and name not in known and not (may_be_own and OWN_LOSS.fullmatch(name)):
            own = ", or module:function" if may_be_own else ""
            raise ValueError(f"expected one of {', '.join(known)}{own}, found {shown_value(name)}")
        return name

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        measured, _ = split_metric(self.metric_for_best_model or "")
        if measured and (measured not in self.representations or len(self.representations) == 1):
            names = ", ".join(f"{name}/" for name in self.representations) if len(self.representations) > 1 else "no"
            yield "metric_for_best_model", f"{measured}/ is none of this run; expected {names} before the metric"
        if self.record_kind == "teacher_vectors" and self.representations != ["dense"]:
            yield "representations", f"expected dense alone with {self.loss_type}, which learns a teacher's vectors"
        if self.teacher_loss_type is not None and self.record_kind != "positives":
            yield "teacher_loss_type", f"goes with a loss on positives, not with {self.loss_type}"
        if self.record_kind == "teacher_vectors" and len(self.train_dataset_vec or ()) != len(self.train_files):
            found, files = len(self.train_dataset_vec or ()), len(self.train_files)
            yield "train_dataset_vec", f"expected a file for each of the {files} of train_dataset, found {found}"
        if self.record_kind == "teacher_vectors" and self.teacher_embedding_dim is None:
            yield "teacher_embedding_dim", f"is missing; {self.loss_type} needs the width of the teacher's vectors"
        if GUIDED.applies(self) and self.guide_model is None:
            yield "guide_model", "is missing; false_negative_judge guide needs an embedding model"
        judge = getattr(self, "false_negative_judge", None)
        if judge in ("guide", "teacher") and self.false_negative_margin is None:
            yield "false_negative_margin", f"is missing; false_negative_judge {judge} needs it, 0 say"
        hard_mode = getattr(self, "hardness_mode", None)
        if hard_mode == "in_batch_negatives" and self.hardness_strength and not self.use_inbatch_neg:
            yield "hardness_mode", f"{hard_mode} are none with use_inbatch_neg false; give hard_negatives"
        if self.mrl_weights and len(self.mrl_weights) != len(self.widths):
            expected = f"expected {len(self.widths)}, one for each of mrl_dims"
            yield "mrl_weights", f"{expected}, found {len(self.mrl_weights)}"
        if self.mrl_dims and max(self.mrl_dims) > (self.teacher_embedding_dim or WHOLE_VECTOR):
            width = f"the {self.teacher_embedding_dim} numbers of a vector (teacher_embedding_dim)"
            yield "mrl_dims", f"{max(self.mrl_dims)} is beyond {width}; leave it out"
        if any(width < 1 for width in self.mrl_dims or ()):
            yield "mrl_dims", "expected widths of at least 1"


def _option_fields() -> dict[str, Any]:
    """A key for each option of a loss. Its default is that of the losses of the run which have it."""
    fields = {}
    for name, option in OPTIONS.items():
        readers = [loss.name for loss in EMBEDDING_LOSSES.values() if name in {own.name for own in loss.options}]
        needs = f" with {option.needs}" if option.needs else ""
        only = Only(f"losses {', '.join(readers)}{needs}", _has_option(name))
        default = "" if option.default is None else f" Default {_shown(option.default)}."
        description = f"{option.description[0].upper()}{option.description[1:]}.{default}"
        if name == "temperature":
            description += " 1 for SPLADE alone, and for token vectors alone without mean_maxsim."
        kind = Annotated[option.type, NAMES] if get_origin(option.type) is tuple else option.type
        fields[name] = (kind | None, key(description, only=only, derive=_default_of(name), **option.limits))
    return fields


def _shown(default: Any) -> str:
    return ", ".join(default) if isinstance(default, tuple) else shown_value(default)


def _has_option(name: str):
    def applies(config: EmbeddingKeys) -> bool:
        """Whether a loss of the run has it, and what it needs is on."""
        options = [option for loss in config.losses for option in loss.options if option.name == name]
        return any(option.needs is None or getattr(config, option.needs) for option in options)

    return applies


def _default_of(name: str):
    def default(config: EmbeddingKeys) -> Any:
        """That of the losses; None where theirs differ, and each has its own."""
        if name == "temperature" and config.has_large_scores:
            return 1.0
        options = [(loss, option) for loss in config.losses for option in loss.options if option.name == name]
        first, *others = [loss.option_values.get(name, option.default) for loss, option in options]
        return None if any(value != first for value in others) else first

    return default


EmbeddingConfig = create_model("EmbeddingConfig", __base__=EmbeddingKeys, __module__=__name__, **_option_fields())
