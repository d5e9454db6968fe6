"""The keys of a reranker's configuration file, beside those that every trainer has.

The names of losses and the keys of their options come from the table of losses, `LOSSES`. A `train_dataset` that is a
list has an entry for each file, which stands for the run as it would be on that file alone.
"""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, TypeAdapter, ValidationError, ValidationInfo, create_model, field_validator, model_validator

from rag_retrieval.core.config import ABSENT, NAME_OR_NAMES, EscapedText, Only, failure, key, shown_value
from rag_retrieval.core.config_reader import error_message
from rag_retrieval.data.readers import DATASET_HELP, DatasetName, is_file
from rag_retrieval.losses import ALIASES, LOSSES
from rag_retrieval.losses.custom import OWN_LOSS
from rag_retrieval.metrics import PATTERNS, parse_metric
from rag_retrieval.train.config import VALIDATED, TrainingConfig

DatasetType = Literal["pointwise", "grouped"]
WEIGHT = TypeAdapter(Annotated[float, Field(gt=0, le=1e6)])
TEACHER_LOSSES = [
    loss.name for loss in LOSSES.values() if loss.dataset_type == "pointwise" or loss.reads == "teacher_score"
]
ACCEPTED = {  # keys of RAG-Retrieval's files that change nothing here: the values that they may have, and why
    "num_labels": ((1, "1"), "expected 1: a reranker gives one score per pair"),
    "val_dataset_type": (("pointwise", "grouped"), "expected pointwise or grouped; validation reads both alike"),
}
DECODER_FORMATS = {
    "query_format": "query: {}",
    "document_format": "document: {}",
    "seq": "\n",
    "special_token": "\nrelevance",
}


def _learns_from_teacher(config: "RerankerKeys") -> bool:
    loss = LOSSES.get(config.loss_type)  # a loss of the user's own may
    return config.teacher_loss_type is not None or loss is None or loss.reads == "teacher_score"


def _fitting_dataset_type(config: "RerankerKeys") -> str | None:
    loss = LOSSES.get(config.loss_type)
    return loss and loss.dataset_type


ENCODER = Only("model_type bert_encoder", lambda config: config.model_type == "bert_encoder")
DECODER = Only("model_type llm_decoder", lambda config: config.model_type == "llm_decoder")
SCALAR = Only(
    "model_type llm_decoder with head scalar",
    lambda config: config.model_type == "llm_decoder" and config.head != "yes_no",
)
LAYERS = Only("runs with start_layer", lambda config: config.start_layer is not None)
YES_NO = Only("head yes_no", lambda config: config.head == "yes_no")
GROUPED = Only("train_dataset_type grouped", lambda config: config.train_dataset_type == "grouped")
HUB_TRAINING = Only(
    "a train_dataset of the hub",
    lambda config: any(not is_file(str(entry.get("path"))) for entry in config.train_entries),
)
TEACHER_LOSS = Only("runs with teacher_loss_type", lambda config: config.teacher_loss_type is not None)
TEACHER_SCORES = Only("losses that learn from teacher scores", _learns_from_teacher)


def _decoder_format(name: str):
    """The default of a text around a pair of a decoder. Those of other models come with the model."""
    return lambda config: DECODER_FORMATS[name] if config.head == "scalar" else None


def _label_bound(end: int):
    """The lowest (0) or highest (1) label: of pairs it becomes 0 or 1; of groups a loss may bound it."""
    def default(config: "RerankerKeys") -> float | None:
        if config.train_dataset_type == "pointwise":
            return float(end)
        loss = LOSSES.get(config.loss_type)
        return float(loss.label_range[end]) if loss and loss.label_range else None

    return default


class RerankerKeys(TrainingConfig):
    """All keys but the options of losses; `RerankerConfig` has these too."""

    validation_keys: ClassVar = TrainingConfig.validation_keys | {"val_label_key"}
    main_keys: ClassVar = ("model_name_or_path", "model_type", "train_dataset", "loss_type", "output_dir")
    groups: ClassVar = TrainingConfig.groups | {"model_type": "Reranker", "train_dataset": "Data", "loss_type": "Loss"}

    # Model
    model_type: Literal["bert_encoder", "llm_decoder"] = Field(description="Family of the model.")
    task: Literal["reranker"] = key("Which trainer it is for.", "reranker")
    max_len: int = key("Longest pair, in tokens, special tokens included.", 512, ge=16)
    head: Literal["scalar", "yes_no"] | None = key(
        "A new scalar head, or yes_no: logit of yes minus logit of no, as Qwen3-Reranker. Then what is not given here "
        "comes with the model, or is Qwen3-Reranker's question in the tokenizer's chat template. Default scalar.",
        only=DECODER, derive=lambda config: "scalar")
    start_layer: int | None = key(
        "A score head at every layer from this one on, counted from 1, so that scoring can stop early. Absent: a head "
        "at the last layer alone.", only=SCALAR, ge=1)
    layer_distillation: float | None = key(
        "Weight of the loss by which the heads before the deepest learn its scores. Default 1.", only=LAYERS,
        derive=lambda config: 1.0, ge=0)
    query_format: EscapedText | None = key(
        'Text around the query, with {} once. Default the model\'s own or "{}"; of a scalar decoder "query: {}".',
        derive=_decoder_format("query_format"))
    document_format: EscapedText | None = key(
        'Text around the document, with {} once. Default the model\'s own or "{}"; of a scalar decoder "document: {}".',
        derive=_decoder_format("document_format"))
    split_special_tokens: bool | None = key(
        "Read special tokens inside texts, such as [SEP], as plain text, as decoders always do. Absent: what the "
        "model's tokenizer says, else false.", only=ENCODER)
    seq: EscapedText | None = key(
        "Text between the two. Default a newline.", only=DECODER, derive=_decoder_format("seq"))
    special_token: EscapedText | None = key(
        'Asks for the score, last. Default "\\nrelevance".', only=DECODER, derive=_decoder_format("special_token"))
    instruction: EscapedText | None = key("Stands where a format says {instruction}.", only=YES_NO)
    yes_token: str | None = key('One token. Default "yes".', only=YES_NO, min_length=1)
    no_token: str | None = key('One token. Default "no".', only=YES_NO, min_length=1)

    # Data
    train_dataset: Annotated[DatasetName | list[DatasetName | dict[str, Any]], NAME_OR_NAMES] = Field(
        min_length=1, description=f"Training data: {DATASET_HELP}, or a list of them that take turns, step by "
        "step. An entry may be a mapping: path, weight (passes over the file in one epoch, above 0, default 1), and "
        "type, label_key, split, group_size, max_label, min_label, batch_size, loss_type and its options in place of "
        "the run's.")
    train_dataset_type: DatasetType | None = key(
        "Train on single pairs (pointwise) or on all documents of a query together (grouped). Default as loss_type "
        "takes them.", derive=_fitting_dataset_type)
    train_label_key: str = key("Key of the label in training data.", "label", min_length=1)
    train_split: str | None = key(
        "Split to train on. Default train.", only=HUB_TRAINING, derive=lambda config: "train", min_length=1)
    train_group_size: int | None = key(
        "Documents per query; larger groups are sampled. Default 8.", only=GROUPED, derive=lambda config: 8, ge=2)
    max_label: float | None = key(
        "Highest label. pointwise: becomes 1, default 1. grouped: only checked, if given.", derive=_label_bound(1))
    min_label: float | None = key(
        "Lowest label. pointwise: becomes 0, default 0. grouped: only checked, if given.", derive=_label_bound(0))
    shuffle_rate: float = key(
        "Probability that a document over 100 characters has its thirds moved.", 0.0, ge=0, le=1)
    val_label_key: str | None = key(
        "Key of the label in validation data. Default as train_label_key.", only=VALIDATED,
        derive=lambda config: config.train_label_key, min_length=1)
    metric_for_best_model: str | None = key(
        f"Validation figure that decides which checkpoint is best: loss, pair_accuracy or one of {PATTERNS}. Default "
        "ndcg@10.", only=VALIDATED, derive=lambda config: "ndcg@10")

    # Loss
    loss_type: str = Field(
        description=f"One of {', '.join(LOSSES)}, or a function of your own, my_package.losses:my_loss.")
    teacher_loss_type: str | None = key(
        f"Second loss, on teacher scores, beside loss_type: one of {', '.join(TEACHER_LOSSES)}. The pointwise ones "
        "take probabilities.")
    teacher_weight: float | None = key(
        "Weight of teacher_loss_type; loss_type has the rest of 1. Default 0.5.", only=TEACHER_LOSS,
        derive=lambda config: 0.5, ge=0, le=1)
    teacher_score_key: str | None = key(
        "Key of the teacher's score, in training and validation data. Default teacher_score.", only=TEACHER_SCORES,
        derive=lambda config: "teacher_score", min_length=1)

    @property
    def train_entries(self) -> list[Mapping[str, Any]]:
        """The entries of `train_dataset`; one file alone is a list of one."""
        entries = self.train_dataset if isinstance(self.train_dataset, list) else [self.train_dataset]
        return [entry if isinstance(entry, Mapping) else {"path": entry} for entry in entries]

    @classmethod
    def resolved_entries(cls, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The entries of a finished configuration's values; one file alone is an entry that says what the run says."""
        files = values["train_dataset"]
        return files if isinstance(files, list) else [_entry(values, 1.0)]

    @property
    def files(self) -> list[tuple[Self, float]]:
        """For each training file the configuration of a run on it alone, and its weight: passes over it in one
        epoch. A `train_dataset` that is no list is one file of weight 1."""
        if isinstance(self.train_dataset, str):
            return [(self, 1.0)]
        return [
            (self.model_copy(update={ENTRY_KEYS[name]: entry[name] for name in ENTRY_KEYS}), entry["weight"])
            for entry in self.train_dataset
        ]

    @model_validator(mode="before")
    @classmethod
    def _without_accepted(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        values = dict(data)
        for name, (allowed, expected) in ACCEPTED.items():
            value = values.pop(name, None)
            if value not in (*ABSENT, *allowed) or isinstance(value, bool):
                raise failure(cls, [(name, f"{expected}, found {shown_value(value)}")], data)
        return values

    @field_validator("loss_type", "teacher_loss_type", mode="after")
    @classmethod
    def _known_loss(cls, name: str, info) -> str:
        name = ALIASES.get(name, name)
        may_be_own = info.field_name == "loss_type"
        known = LOSSES if may_be_own else TEACHER_LOSSES
        if name not in known and not (may_be_own and OWN_LOSS.fullmatch(name)):
            own = ", or module:function" if may_be_own else ""
            raise ValueError(f"expected one of {', '.join(known)}{own}, found {shown_value(name)}")
        return name

    @field_validator("metric_for_best_model", mode="after")
    @classmethod
    def _known_metric(cls, name: str | None) -> str | None:
        if name not in (None, "loss", "pair_accuracy"):
            parse_metric(name)
        return name

    def problems(self) -> Iterator[tuple[str, str]]:
        yield from super().problems()
        for name in ("query_format", "document_format"):
            text = getattr(self, name)
            if text is not None and text.count("{}") != 1:
                yield name, f'expected "{{}}" exactly once, where the text goes, found {shown_value(text)}'
        if self.special_token == "":
            yield "special_token", "expected text: the score of a decoder is read at its last token"
        if self.train_dataset_type is None:
            yield "train_dataset_type", f"expected pointwise or grouped: what {self.loss_type} takes"
        for name in ("loss_type", "teacher_loss_type"):
            loss = LOSSES.get(getattr(self, name))
            if loss is not None and loss.dataset_type != self.train_dataset_type:
                fitting = LOSSES if name == "loss_type" else TEACHER_LOSSES
                fitting = [other for other in fitting if LOSSES[other].dataset_type == self.train_dataset_type]
                yield name, (f"{loss.name} is for {loss.dataset_type} data, and train_dataset_type is "
                             f"{self.train_dataset_type}; for that use {_listed(fitting)}")
        yield from self._label_problems()

    def _label_problems(self) -> Iterator[tuple[str, str]]:
        low, high = self.min_label, self.max_label
        if low is not None and high is not None and low >= high:
            given = "max_label" if "max_label" in self.model_fields_set else "min_label"
            yield given, f"expected min_label below max_label, found min_label {low:g} and max_label {high:g}"
        bounds = LOSSES[self.loss_type].label_range if self.loss_type in LOSSES else None
        for name, value in (("min_label", low), ("max_label", high)):
            if bounds and self.train_dataset_type == "grouped" and not bounds[0] <= value <= bounds[1]:
                yield name, f"{self.loss_type} takes labels in [{bounds[0]:g}, {bounds[1]:g}], found {value:g}"

    @model_validator(mode="after")
    def _resolve_entries(self, info: ValidationInfo) -> Self:
        """Make each entry of a list say everything that a run on its file alone would say."""
        if isinstance(self.train_dataset, str):
            return self
        resolved, problems = [], []
        for number, entry in enumerate(self.train_entries, 1):
            place = f"entry {number} ({Path(str(entry.get('path'))).name})"
            wrong = list(_entry_problems(entry))
            if not wrong:
                try:
                    alone = self._alone(entry, info.context)
                except ValidationError as error:
                    wrong = list(_messages(error))
                else:
                    resolved.append(_entry(vars(alone), _weight(entry)))
                    for name, of_run in ENTRY_KEYS.items():
                        if name in entry and of_run in alone._ignored:
                            self._ignored[f"{name} of {place}"] = alone._ignored[of_run]
            problems += [("train_dataset", f"{place}: {message}") for message in wrong]
        if problems:
            raise failure(type(self), problems, vars(self))
        vars(self)["train_dataset"] = resolved
        return self

    def _alone(self, entry: Mapping[str, Any], context: Any) -> Self:
        """The configuration of a run on the entry's file alone: what it says itself, and what it takes of the run.

        An entry of another data type or loss takes none of the run's keys that go with these: a label range of pairs
        says nothing of groups, nor a temperature of one loss anything of another.
        """
        own = {ENTRY_KEYS[name]: value for name, value in entry.items() if name != "weight"}
        own = {name: None if value in ABSENT else value for name, value in own.items()}
        loss = own.get("loss_type") or self.loss_type
        loss = ALIASES.get(loss, loss) if isinstance(loss, str) else loss
        dataset_type = own.get("train_dataset_type") or self.train_dataset_type
        if "train_dataset_type" not in own and "loss_type" in own and loss in LOSSES:
            dataset_type = LOSSES[loss].dataset_type
        left_out = set() if dataset_type == self.train_dataset_type else {"train_group_size", "max_label", "min_label"}
        if loss != self.loss_type:
            left_out |= {name for name in ENTRY_KEYS.values() if name in OPTION_KEYS or name.startswith("teacher_")}
        of_run = {name: getattr(self, name) for name in self.model_fields_set - left_out}
        return type(self).model_validate(of_run | own | {"train_dataset_type": dataset_type}, context=context)


def _entry_problems(entry: Mapping[str, Any]) -> Iterator[str]:
    """What is wrong with an entry by itself, but for the values of the run's keys."""
    for name in entry:
        if name not in ("weight", *ENTRY_KEYS):
            yield f"unknown key {name}; an entry takes weight, {', '.join(ENTRY_KEYS)}"
    if not isinstance(entry.get("path"), str) or entry["path"] in ("", *ABSENT):
        yield f"path: expected a file or a hub dataset, found {shown_value(entry.get('path'))}"
    try:
        _weight(entry)
    except ValidationError:
        found = shown_value(entry["weight"])
        yield f"weight: expected passes over the file in one epoch, above 0 and at most a million, found {found}"


def _weight(entry: Mapping[str, Any]) -> float:
    return 1.0 if entry.get("weight") in ABSENT else WEIGHT.validate_python(entry["weight"])


def _messages(error: ValidationError) -> Iterator[str]:
    """One for each key of the run on an entry's file alone that is wrong; the key as the entry spells it."""
    names = {of_run: name for name, of_run in ENTRY_KEYS.items()}
    details = {detail["loc"][0]: detail for detail in reversed(error.errors(include_url=False))}  # a union has several
    for name, detail in details.items():
        yield f"{names.get(name, name)}: {error_message(name, detail, RerankerConfig, nested=False)}"


def _entry(values: Mapping[str, Any], weight: float) -> dict[str, Any]:
    return {"weight": float(weight)} | {name: values[of_run] for name, of_run in ENTRY_KEYS.items()}


def _option_fields() -> dict[str, Any]:
    """A key for each option of a loss, and one with `teacher_` before its name for each of a teacher loss."""
    fields = {}
    for prefix, names in (("", list(LOSSES)), ("teacher_", TEACHER_LOSSES)):
        for option in {option.name: option for name in names for option in LOSSES[name].options}.values():
            readers = [name for name in names if option.name in [own.name for own in LOSSES[name].options]]
            only = _only_for_losses(f"{prefix}loss_type", readers)
            default = "" if option.default is None else f" Default {option.default}."
            description = f"{option.description[0].upper()}{option.description[1:]}.{default}"
            derive = _option_default(f"{prefix}loss_type", option.name)
            field = key(description, only=only, derive=derive, **option.limits)
            fields[prefix + option.name] = (option.type | None, field)
    return fields


def _only_for_losses(loss_key: str, readers: list[str]) -> Only:
    return Only(f"{loss_key} {_listed(readers)}", lambda config: getattr(config, loss_key) in readers)


def _option_default(loss_key: str, name: str):
    def default(config: RerankerKeys) -> Any:
        return next(option.default for option in LOSSES[getattr(config, loss_key)].options if option.name == name)

    return default


def _listed(names: list[str]) -> str:
    *first, last = names
    return f"{', '.join(first)} or {last}" if first else last


RerankerConfig = create_model("RerankerConfig", __base__=RerankerKeys, __module__=__name__, **_option_fields())
OPTION_KEYS = tuple(_option_fields())
ENTRY_KEYS = {  # key of an entry: the key of the run for which it stands
    "path": "train_dataset",
    "type": "train_dataset_type",
    "label_key": "train_label_key",
    "split": "train_split",
    "group_size": "train_group_size",
    **{name: name for name in ("max_label", "min_label", "batch_size", "loss_type", "teacher_loss_type",
                               "teacher_weight", "teacher_score_key", *OPTION_KEYS)},
}  # fmt: skip
