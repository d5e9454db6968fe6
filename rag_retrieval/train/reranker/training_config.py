"""What a reranker training run can be told: every key with its type, range and meaning.

Easy to get wrong: many keys have a default that hangs on another key (`head_lr` is 10 x `lr`). Such a field
is declared with default None, and a finished `TrainingConfig` has the real value in it. None in a finished
configuration therefore means "does not apply to this run" or "off".

Nothing here imports torch: a wrong configuration must be reported before anything heavy is loaded.
"""

import re
from collections.abc import Iterator, Mapping, Set
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from rag_retrieval.core.config_file import FLOAT_DIGITS
from rag_retrieval.core.config_schema import ABSENT, Schema, message_of, problem
from rag_retrieval.train.reranker.config_checks import DECODER_DEFAULTS, cross_field_problems
from rag_retrieval.train.reranker.derived_values import derived_values
from rag_retrieval.train.reranker.training_files import (
    as_entries,
    entry_name,
    entry_problems,
    in_words_of_an_entry,
    own_values,
    resolved_entry,
    values_alone,
    weight_of,
)

LOSS_ALIASES = {"pointwise_bce": "point_ce", "pointwise_mse": "point_mse"}
KEY_ALIASES = {"epoch": "epochs"}

DatasetType = Literal["pointwise", "grouped"]


class TrainingConfig(BaseModel):
    """The validated configuration of one run. Frozen; types are strict (True and "32" are no numbers).

    Raises pydantic.ValidationError with every problem of the given values at once, cross-field ones included.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    # Model
    model_name_or_path: str = Field(
        min_length=1, description="Folder, hub name, or package:NAME (the model in an installed package).")
    model_type: Literal["bert_encoder", "llm_decoder"] = Field(description="Family of the model.")
    num_labels: int = Field(1, description="Scores per pair; a reranker gives one, so only 1 is accepted.")
    query_format: str | None = Field(
        None, description='llm_decoder only: text around the query, with {} once. Default "query: {}".')
    document_format: str | None = Field(
        None, description='llm_decoder only: text around the document, with {} once. Default "document: {}".')
    seq: str | None = Field(None, description="llm_decoder only: text between the two. Default a newline.")
    special_token: str | None = Field(
        None, min_length=1, description='llm_decoder only: asks for the score, last. Default "\\nrelevance".')
    head: Literal["scalar", "yes_no"] | None = Field(
        None, description="llm_decoder only: a new scalar head, or yes_no: logit of yes minus logit of no, as "
        "Qwen3-Reranker. Then what is not given here comes with the model, or is Qwen3-Reranker's question in the "
        "tokenizer's chat template. Default scalar.")
    instruction: str | None = Field(
        None, description="head yes_no only: stands where a format says {instruction}.")
    yes_token: str | None = Field(None, min_length=1, description='head yes_no only: one token. Default "yes".')
    no_token: str | None = Field(None, min_length=1, description='head yes_no only: one token. Default "no".')
    max_len: int = Field(512, ge=16, description="Longest pair, in tokens, special tokens included.")
    attn_implementation: str | None = Field(
        None, min_length=1, description="Attention code, such as eager or sdpa; batches are then padded. Absent: "
        "ours, without padding, where the model passes a check at load, else the model's own.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations: less memory, more time.")
    torch_compile: bool = Field(
        False, description="Compile the transformer layers. Measured on a CPU: 3 to 6 percent slower, so off.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model.")

    # Data
    train_dataset: str | list[str | dict[str, Any]] = Field(
        min_length=1, description="Training data: a file or a hub dataset, or a list of them that take turns, step by "
        "step. An entry may be a mapping: path, weight (passes over the file in one epoch, above 0, default 1), and "
        "type, label_key, split, group_size, max_label, min_label, batch_size, loss_type and its options in place of "
        "the run's.")
    train_dataset_type: DatasetType = Field(
        description="Train on single pairs (pointwise) or on all documents of a query together (grouped).")
    train_label_key: str = Field("label", min_length=1, description="Key of the label in training data.")
    train_split: str | None = Field(
        None, min_length=1, description="hub datasets only: split to train on. Default train.")
    train_group_size: int | None = Field(
        None, ge=2, description="grouped only: documents per query; larger groups are sampled. Default 8.")
    max_label: float | None = Field(
        None, description="Highest label. pointwise: becomes 1, default 1. grouped: only checked, if given.")
    min_label: float | None = Field(
        None, description="Lowest label. pointwise: becomes 0, default 0. grouped: only checked, if given.")
    shuffle_rate: float = Field(
        0.0, ge=0, le=1, description="Probability that a document over 100 characters has its thirds moved.")
    val_dataset: str | None = Field(
        None, min_length=1, description="Validation data: a file or a hub dataset. Absent: no validation.")
    val_dataset_type: DatasetType | None = Field(None, description="Default as train_dataset_type.")
    val_label_key: str | None = Field(
        None, min_length=1, description="Key of the label in validation data. Default as train_label_key.")
    val_split: str | None = Field(
        None, min_length=1, description="hub datasets only: split to validate on. Default validation.")
    num_workers: int = Field(2, ge=0, description="Data loading processes beside each training process.")

    # Loss
    loss_type: Literal[
        "point_ce", "point_mse", "pairwise_ranknet", "listwise_ce", "listnet", "listmle", "position_listmle",
        "lambda_loss", "info_nce", "adr_mse", "margin_mse", "kl_distillation",
    ] = Field(  # fmt: skip
        description="The first two are for pointwise data, and also called pointwise_bce and pointwise_mse. The last "
        "two learn from teacher scores.")
    temperature: float | None = Field(
        None, gt=0, description="listwise_ce, info_nce, kl_distillation only: divides scores. Default 1.")
    lambda_weights: Literal["ndcg_loss2pp", "lambdarank"] | None = Field(
        None, description="lambda_loss only: how it weights pairs. Default ndcg_loss2pp.")
    lambda_top_k: int | None = Field(
        None, ge=1, description="lambda_loss only: k of the nDCG@k to learn. Absent: the whole ranking.")
    teacher_loss_type: Literal["point_ce", "point_mse", "margin_mse", "kl_distillation"] | None = Field(
        None, description="Second loss, on teacher scores, beside loss_type; the first two take probabilities.")
    teacher_weight: float | None = Field(
        None, ge=0, le=1, description="Weight of teacher_loss_type; loss_type has the rest of 1. Default 0.5.")
    teacher_temperature: float | None = Field(
        None, gt=0, description="teacher_loss_type kl_distillation only: divides scores. Default 1.")
    teacher_score_key: str | None = Field(
        None, min_length=1, description="Key of the teacher's score, in training and validation data, for losses that "
        "learn from it. Default teacher_score.")

    # Training
    output_dir: str = Field(min_length=1, description="Folder for all results, from the current folder.")
    epochs: int = Field(1, ge=1, description="Passes over the training data. Also written epoch.")
    batch_size: int = Field(
        32, ge=1, description="Per process and micro-batch: pairs (pointwise) or groups (grouped).")
    max_tokens_per_batch: int | None = Field(
        None, ge=16, description="Most tokens of a forward pass, padding included: a batch is cut into several, with "
        "the same result. Absent: 2048 on a CPU (1024 where batches are padded), no bound elsewhere.")
    gradient_accumulation_steps: int = Field(1, ge=1, description="Micro-batches per optimizer step.")
    lr: float = Field(5e-5, gt=0, description="Highest learning rate.")
    head_lr: float | None = Field(
        None, gt=0, description="Highest learning rate of a newly initialised head. Default 10 x lr.")
    weight_decay: float = Field(0.01, ge=0, description="AdamW weight decay; none on biases and norms.")
    adam_beta1: float = Field(0.9, ge=0, lt=1, description="AdamW decay of the gradient's mean.")
    adam_beta2: float = Field(0.999, ge=0, lt=1, description="AdamW decay of the squared gradient's mean.")
    adam_epsilon: float = Field(1e-8, gt=0, description="AdamW term against division by zero.")
    max_grad_norm: float | None = Field(
        1.0, gt=0, description="Clip the gradient to this L2 norm. Written out as None: no clipping.")
    warmup_proportion: float = Field(
        0.1, ge=0, le=1, description="Fraction of optimizer steps in which lr rises from 0.")
    stable_proportion: float = Field(
        0.0, ge=0, le=1, description="Fraction of optimizer steps, after warmup, at full lr. Then cosine.")
    mixed_precision: Literal["no", "fp16", "bf16"] = Field("no", description="Autocast; weights are float32.")
    seed: int = Field(42, ge=0, description="Seed of head, data order, sampling and dropout.")
    freeze_embeddings: bool = Field(False, description="Do not train the embeddings.")
    freeze_layers: int = Field(0, ge=0, description="Number of lower layers that are not trained.")
    lora_r: int | None = Field(None, ge=1, description="Rank of LoRA adapters. Absent: train all weights.")
    lora_alpha: int | None = Field(None, ge=1, description="LoRA only: scale, as alpha / r. Default 2 x r.")
    lora_dropout: float | None = Field(None, ge=0, lt=1, description="LoRA only: dropout. Default 0.")
    lora_target_modules: list[str] | str | None = Field(
        None, min_length=1, description="LoRA only: module names, or all-linear. Absent: peft's choice.")

    # Checkpoints, evaluation, tracking
    save_on_epoch_end: bool = Field(True, description="Write a checkpoint at the end of each epoch.")
    save_steps: int | None = Field(None, ge=1, description="Also write one every so many optimizer steps.")
    num_max_checkpoints: int = Field(3, ge=1, description="Newest checkpoints to keep, beside the best.")
    eval_steps: int | None = Field(
        None, ge=1, description="Validate every so many optimizer steps. Absent: at the end of each epoch.")
    eval_on_start: bool = Field(False, description="Also validate before the first step.")
    metric_for_best_model: Literal["loss", "ndcg@10", "mrr@10", "map", "pair_accuracy"] | None = Field(
        None, description="Validation figure that decides which checkpoint is best. Default ndcg@10.")
    early_stopping_patience: int | None = Field(
        None, ge=1, description="Stop after so many validations without improvement. Absent: never.")
    overwrite_output_dir: bool = Field(
        False, description="Replace the run that output_dir holds. Otherwise a second run there is refused.")
    resume: str | None = Field(
        None, min_length=1, description="auto (newest checkpoint in output_dir, if any) or a folder.")
    resume_with_changes: bool = Field(
        False, description="Resume though model, data, loss, schedule or batch differ from the checkpoint's.")
    log_interval: int = Field(10, ge=1, description="Optimizer steps between two logged lines.")
    log_with: Literal["wandb", "tensorboard"] | None = Field(None, description="Tracker beside our JSONL.")

    @model_validator(mode="wrap")
    @classmethod
    def _report_all_and_resolve(cls, data: Mapping[str, Any], handler) -> "TrainingConfig":
        values, errors = _normalise(data)
        errors += _field_errors(handler, values)
        valid = _valid_values(values, {entry["loc"][0] for entry in errors})
        problems = list(cross_field_problems(valid))
        several = isinstance(valid.get("train_dataset"), list)
        found = list(_entry_problems(handler, values, problems)) if several else []
        errors += [_problem(key, message, values.get(key)) for key, message in problems + found]
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        if several:
            entries = as_entries(values["train_dataset"])
            values["train_dataset"] = [_resolved(handler, values, entry) for entry in entries]
        return handler(values | derived_values(valid))

    @property
    def files(self) -> list[tuple["TrainingConfig", float]]:
        """For each training file the configuration of a run on it alone, and its weight: passes over it in one
        epoch. A `train_dataset` that is no list is one file of weight 1."""
        if isinstance(self.train_dataset, str):
            return [(self, 1.0)]
        return [(self.model_copy(update=own_values(entry)), entry["weight"]) for entry in self.train_dataset]

    def to_yaml(self) -> str:
        """Every key with its resolved value; `load_config` reads it back as an equal object."""
        return yaml.dump(self.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_yaml(), encoding="utf-8")


TRAINING = Schema(
    TrainingConfig,
    "model_type: bert_encoder",
    aliases=KEY_ALIASES,
    models=("model_name_or_path",),
    datasets=("train_dataset", "val_dataset"),
    folders=("resume",),
    outputs=("output_dir",),
    escaped=tuple(DECODER_DEFAULTS),
    words={"resume": ("auto",)},
)


class _Dumper(yaml.SafeDumper):
    """Quotes what our reader would otherwise take for a number, such as the folder name "1e5"."""


_TAG = "tag:yaml.org,2002:"
_Dumper.add_representer(str, lambda dumper, text: dumper.represent_scalar(
    _TAG + "str", text, style='"' if "\n" in text else None))  # other styles fold a newline over three lines
_Dumper.add_implicit_resolver(_TAG + "float", re.compile(f"(?:{FLOAT_DIGITS})$"), list("-+.0123456789"))


def _field_errors(handler, values: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What pydantic finds wrong with single values."""
    try:
        handler(values)
    except ValidationError as error:
        parts = ("type", "loc", "input", "ctx")
        return [{part: entry.get(part, {}) for part in parts} for entry in error.errors(include_url=False)]
    return []


def _entry_problems(handler, run: Mapping[str, Any], told: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """("train_dataset", message) for what is wrong with its entries, without the problems told of the run."""
    for number, entry in enumerate(as_entries(run["train_dataset"]), 1):
        found = list(entry_problems(entry)) or _problems_alone(handler, run, entry, told)
        for message in found:
            yield "train_dataset", f"{entry_name(number, entry)}: {message}"


def _problems_alone(handler, run: Mapping[str, Any], entry: Mapping[str, Any], told: list) -> list[str]:
    """What would be wrong with a run on the entry's file alone, but for what is wrong with the run anyhow."""
    values, errors = _values_alone(run, entry), {}
    for error in _field_errors(handler, values):
        errors.setdefault(error["loc"][0], error)
    valid = _valid_values(values, errors.keys())
    found = [(key, message_of(key, error, values.get(key), TRAINING))
             for key, error in errors.items() if key in own_values(entry)]
    found += [problem for problem in cross_field_problems(valid) if problem not in told]
    return [in_words_of_an_entry(f"{key}: {message}") for key, message in found]


def _values_alone(run: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The values of a run on the entry's file alone; absent ones are left out."""
    own = {key: _normalise_value(key, value) for key, value in own_values(entry).items()}
    return _normalise(values_alone(run, own))[0]


def _resolved(handler, run: Mapping[str, Any], entry: Mapping[str, Any]) -> dict[str, Any]:
    """The entry with every key. Run and entry are valid."""
    values = _values_alone(run, entry)
    finished = handler(values | derived_values(_valid_values(values, set())))
    return resolved_entry(weight_of(entry), dict(finished))


def _problem(key: str, message: str, found: Any) -> InitErrorDetails:
    return InitErrorDetails(type=problem(message), loc=(key,), input=found)


def _normalise(data: Mapping[str, Any]) -> tuple[dict[str, Any], list[InitErrorDetails]]:
    """Other spellings of the same thing become one; absent values are left out."""
    # max_grad_norm alone has both a default and an "off", so its None is a value; unknown keys are kept too
    droppable = (TrainingConfig.model_fields.keys() | KEY_ALIASES.keys()) - {"max_grad_norm"}
    values = {key: None if value in ABSENT else value for key, value in data.items()
              if value not in ABSENT or key not in droppable}
    errors = []
    for alias, key in KEY_ALIASES.items():
        if alias in values and key in values:
            message = f"is another name of {key}, which is given too; keep one"
            errors.append(_problem(alias, message, values.pop(alias)))
        elif alias in values:
            values[key] = values.pop(alias)
    for key, value in values.items():
        values[key] = _normalise_value(key, value)
    return values, errors


def _normalise_value(key: str, value: Any) -> Any:
    if key in ("loss_type", "teacher_loss_type") and isinstance(value, str):
        return LOSS_ALIASES.get(value, value)
    if key == "mixed_precision" and value is False:
        return "no"  # YAML 1.1 reads a bare `no` as False
    field = TrainingConfig.model_fields.get(key)
    if field and field.annotation is bool and type(value) is int and value in (0, 1):
        return bool(value)  # existing files say `save_on_epoch_end: 1`
    return value


def _valid_values(values: dict[str, Any], invalid: Set[str]) -> dict[str, Any]:
    """Given values and plain defaults without those of invalid keys."""
    fields = TrainingConfig.model_fields
    defaults = {key: field.default for key, field in fields.items() if not field.is_required()}
    return {key: value for key, value in (defaults | values).items() if key not in invalid}
