"""The keys of a configuration file that every trainer has: model, optimizer, schedule, checkpoints, validation, log.

A field states beside its meaning when its key applies (`only`) and what its default depends on (`derive`). A finished
configuration has every value in it; None there means "off" or "does not apply to this run". Nothing here imports torch:
a wrong configuration is reported before anything heavy is loaded.
"""

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, ClassVar, Literal, NamedTuple, Self

import yaml
from pydantic import BaseModel, ConfigDict, Field, PrivateAttr, ValidationError, field_validator, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import InitErrorDetails

from rag_retrieval.core.config_schema import ABSENT, is_data_file_name, problem


class Only(NamedTuple):
    """To which runs a key applies, in words ("model_type llm_decoder") and as a function of the configuration."""

    words: str
    applies: Callable[[Any], bool]


def key(
    description: str,
    default: Any = None,
    *,
    only: Only | None = None,
    derive: Callable[[Any], Any] | None = None,
    **limits: Any,
) -> Any:
    """A field. derive: its default from the configuration, where it depends on other keys. limits: for `Field`."""
    description = f"{description} Only for {only.words}." if only else description
    return Field(default, description=description, json_schema_extra={"only": only, "derive": derive}, **limits)


def rule(field: FieldInfo, name: Literal["only", "derive"]) -> Any:
    return (field.json_schema_extra or {}).get(name)


LORA = Only("runs with lora_r", lambda config: config.lora_r is not None)
VALIDATED = Only("runs with val_dataset", lambda config: config.val_dataset is not None)
HUB_VALIDATION = Only(
    "a val_dataset of the hub", lambda config: VALIDATED.applies(config) and not is_data_file_name(config.val_dataset)
)


class TrainingConfig(BaseModel):
    """The validated configuration of one run. Frozen. Raises pydantic.ValidationError with every wrong value at once,
    or where each is valid by itself, with all that do not fit each other."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    aliases: ClassVar[Mapping[str, str]] = {"epoch": "epochs"}
    _ignored: dict[str, str] = PrivateAttr(default_factory=dict)  # key given, and to what alone it applies

    # Model
    model_name_or_path: str = Field(
        min_length=1, description="Folder, hub name, or package:NAME (the model in an installed package).")
    max_len: int = key("Longest input, in tokens, special tokens included.", 512, ge=16)
    attn_implementation: str | None = key(
        "Attention code, such as eager or sdpa; batches are then padded. Absent: ours, without padding, where the "
        "model passes a check at load, else the model's own.", min_length=1)
    gradient_checkpointing: bool = key("Recompute activations: less memory, more time.", False)
    torch_compile: bool = key(
        "Compile the transformer layers. Measured on a CPU: 3 to 6 percent slower, so off.", False)
    trust_remote_code: bool = key("Run Python code that comes with the model.", False)
    freeze_embeddings: bool = key("Do not train the embeddings.", False)
    freeze_layers: int = key("Number of lower layers that are not trained.", 0, ge=0)
    lora_r: int | None = key("Rank of LoRA adapters. Absent: train all weights.", ge=1)
    lora_alpha: int | None = key(
        "Scale, as alpha / r. Default 2 x r.", only=LORA, derive=lambda config: 2 * config.lora_r, ge=1)
    lora_dropout: float | None = key("Dropout. Default 0.", only=LORA, derive=lambda config: 0.0, ge=0, lt=1)
    lora_target_modules: list[str] | str | None = key(
        "Module names, or all-linear. Absent: peft's choice.", only=LORA, min_length=1)

    # Run
    output_dir: str = Field(min_length=1, description="Folder for all results, from the current folder.")
    overwrite_output_dir: bool = key(
        "Replace the run that output_dir holds. Otherwise a second run there is refused.", False)
    resume: str | None = key("auto (newest checkpoint in output_dir, if any) or a folder.", min_length=1)
    resume_with_changes: bool = key(
        "Resume though model, data, loss, schedule or batch differ from the checkpoint's.", False)
    seed: int = key("Seed of new weights, data order, sampling and dropout.", 42, ge=0)
    num_workers: int = key("Data loading processes beside each training process.", 2, ge=0)

    # Steps
    epochs: int = key("Passes over the training data. Also written epoch.", 1, ge=1)
    batch_size: int = key("Records per process and micro-batch.", 32, ge=1)
    max_tokens_per_batch: int | None = key(
        "Most tokens of a forward pass, padding included: a batch is cut into several, with the same result. Absent: "
        "2048 on a CPU (1024 where batches are padded), no bound elsewhere.", ge=16)
    gradient_accumulation_steps: int = key("Micro-batches per optimizer step.", 1, ge=1)
    mixed_precision: Literal["no", "fp16", "bf16"] = key("Autocast; weights are float32.", "no")
    lr: float = key("Highest learning rate.", 5e-5, gt=0)
    head_lr: float | None = key(
        "Highest learning rate of newly initialised weights. Default 10 x lr.", derive=lambda config: 10 * config.lr,
        gt=0)
    weight_decay: float = key("AdamW weight decay; none on biases and norms.", 0.01, ge=0)
    adam_beta1: float = key("AdamW decay of the gradient's mean.", 0.9, ge=0, lt=1)
    adam_beta2: float = key("AdamW decay of the squared gradient's mean.", 0.999, ge=0, lt=1)
    adam_epsilon: float = key("AdamW term against division by zero.", 1e-8, gt=0)
    max_grad_norm: float | None = key(
        "Clip the gradient to this L2 norm. Written out as None: no clipping.", 1.0, gt=0)
    warmup_proportion: float = key("Fraction of optimizer steps in which lr rises from 0.", 0.1, ge=0, le=1)
    stable_proportion: float = key(
        "Fraction of optimizer steps, after warmup, at full lr. Then cosine.", 0.0, ge=0, le=1)

    # Validation
    val_dataset: str | None = key(
        "Validation data: a file or a hub dataset. Absent: no validation.", min_length=1)
    val_split: str | None = key(
        "Split to validate on. Default validation.", only=HUB_VALIDATION, derive=lambda config: "validation",
        min_length=1)
    eval_steps: int | None = key(
        "Validate every so many optimizer steps. Absent: at the end of each epoch.", only=VALIDATED, ge=1)
    eval_on_start: bool = key("Also validate before the first step.", False, only=VALIDATED)
    early_stopping_patience: int | None = key(
        "Stop after so many validations without improvement. Absent: never.", only=VALIDATED, ge=1)

    # Checkpoints and log
    save_on_epoch_end: bool = key("Write a checkpoint at the end of each epoch.", True)
    save_steps: int | None = key("Also write one every so many optimizer steps.", ge=1)
    num_max_checkpoints: int = key("Newest checkpoints to keep, beside the best.", 3, ge=1)
    log_interval: int = key("Optimizer steps between two logged lines.", 10, ge=1)
    log_with: Literal["wandb", "tensorboard"] | None = key("Tracker beside our JSONL.")

    @property
    def ignored(self) -> str | None:
        """One line of the keys that were given and do not apply to this run; None where all do."""
        by_words: dict[str, list[str]] = {}
        for name, words in self._ignored.items():
            by_words.setdefault(words, []).append(name)
        parts = [f"{', '.join(names)} (only for {words})" for words, names in by_words.items()]
        return f"ignored, for they do not apply to this run: {'; '.join(parts)}" if parts else None

    def to_yaml(self) -> str:
        """Every key with its resolved value; `load_config` reads it back as an equal object."""
        return yaml.dump(self.model_dump(), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    @model_validator(mode="before")
    @classmethod
    def _one_spelling(cls, data: Mapping[str, Any]) -> dict[str, Any]:
        """Other spellings of the same thing become one; what is absent is left out."""
        values = dict(data)
        for alias, name in cls.aliases.items():
            if alias in values and name in values:
                raise failure(cls, [(alias, f"is another name of {name}, which is given too; keep one")], values)
            if alias in values:
                values[name] = values.pop(alias)
        if values.get("mixed_precision") is False:
            values["mixed_precision"] = "no"  # YAML reads a bare `no` as false
        given = {name: value for name, value in values.items() if not cls._absent(name, value)}
        return {name: None if value in ABSENT else value for name, value in given.items()}

    @classmethod
    def _absent(cls, name: str, value: Any) -> bool:
        field = cls.model_fields.get(name)
        if field is None or (name == "max_grad_norm" and value in ABSENT):  # its None is a value: no clipping
            return False
        return value in ABSENT or (value is False and rule(field, "only") is not None)

    @field_validator("*", mode="before")
    @classmethod
    def _no_switch_for_a_number(cls, value: Any, info) -> Any:
        if isinstance(value, bool) and cls.model_fields[info.field_name].annotation in _NUMBERS:
            raise ValueError("expected a number")
        return value

    @model_validator(mode="after")
    def _resolve(self) -> Self:
        """Drop what does not apply, derive what was not given, in the order of the fields; then compare keys."""
        values = vars(self)  # a frozen model takes no assignment
        for name, field in type(self).model_fields.items():
            only, derive = rule(field, "only"), rule(field, "derive")
            if only and not only.applies(self):
                if name in self.model_fields_set:
                    self._ignored[name] = only.words
                values[name] = field.default
            elif derive and name not in self.model_fields_set:
                values[name] = derive(self)
        problems = list(self.problems())
        if problems:
            raise failure(type(self), problems, values)
        return self

    def problems(self) -> Iterator[tuple[str, str]]:
        """(key, message) for values that do not fit each other."""
        warmup, stable = self.warmup_proportion, self.stable_proportion
        if warmup + stable > 1 + 1e-9:  # 0.7 + 0.2 + 0.1 is not 1 in binary
            yield "stable_proportion", f"expected at most 1 with warmup_proportion, found {warmup:g} + {stable:g}"


_NUMBERS = (int, float, int | None, float | None)


def failure(model: type[BaseModel], problems: list[tuple[str, str]], values: Mapping[str, Any]) -> ValidationError:
    """pydantic's error for (key, message) pairs."""
    details = [InitErrorDetails(type=problem(text), loc=(name,), input=values.get(name)) for name, text in problems]
    return ValidationError.from_exception_data(model.__name__, details)


class _Dumper(yaml.SafeDumper):
    """Quotes text that a reader would take for a number, such as the folder name "1e5"."""


def _represent_text(dumper: yaml.SafeDumper, text: str) -> yaml.ScalarNode:
    quoted = "\n" in text or _is_number(text)  # other styles fold a newline over three lines
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


_Dumper.add_representer(str, _represent_text)
