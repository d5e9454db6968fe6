"""The keys of a configuration file that every trainer has: model, optimizer, schedule, checkpoints, validation, log.

A finished configuration has every value in it; None there means "off" or "does not apply to this run". Nothing here
imports torch: a wrong configuration is reported before anything heavy is loaded.
"""

from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

import yaml
from pydantic import Field

from rag_retrieval.core.config import (
    NAME_OR_NAMES,
    Config,
    Location,
    ModelName,
    Only,
    OutputPath,
    key,
)
from rag_retrieval.data.readers import DATASET_HELP, DatasetName, is_file

LIBRARIES = (  # key, value, what it needs; the extra has the name of the value
    ("fine_tune_type", "lora", "peft"), ("log_with", "tensorboard", "tensorboard"), ("log_with", "wandb", "wandb"),
)  # fmt: skip

LORA = Only("fine_tune_type lora", lambda config: config.fine_tune_type == "lora")
RESUMED = Only("runs with resume", lambda config: config.resume is not None)
VALIDATED = Only("runs with val_dataset", lambda config: config.val_dataset is not None)
HUB_VALIDATION = Only(
    "a val_dataset of the hub", lambda config: VALIDATED.applies(config) and not is_file(config.val_dataset)
)


class TrainingConfig(Config):
    """The validated configuration of one run. Each trainer's own has a key `task` with its name.

    validation_keys: what an evaluation depends on; figures before and after a change of one are not compared.
    """

    validation_keys: ClassVar = {"val_dataset", "val_split", "metric_for_best_model"}
    aliases: ClassVar = {
        "epoch": "epochs",
        # transformers' names
        "per_device_train_batch_size": "batch_size",
        "learning_rate": "lr",
        "num_train_epochs": "epochs",
        "warmup_ratio": "warmup_proportion",
        "logging_steps": "log_interval",
        "save_total_limit": "num_max_checkpoints",
        "dataloader_num_workers": "num_workers",
        "report_to": "log_with",
    }
    groups: ClassVar = {
        "model_name_or_path": "Model",
        "output_dir": "Run",
        "epochs": "Steps",
        "val_dataset": "Validation",
        "save_on_epoch_end": "Checkpoints and log",
    }

    # Model
    model_name_or_path: ModelName = Field(
        min_length=1, description="Folder, hub name, or package:NAME (the model in an installed package).")
    attn_implementation: str | None = key(
        "Attention code, such as eager or sdpa; batches are then padded. Absent: ours, without padding, where the "
        "model passes a check at load, else the model's own.", min_length=1)
    gradient_checkpointing: bool = key("Recompute activations: less memory, more time.", False)
    torch_compile: bool = key(
        "Compile the transformer layers. Measured on a CPU: 3 to 6 percent slower, so off.", False)
    trust_remote_code: bool = key("Run Python code that comes with the model.", False)
    freeze_embeddings: bool = key("Do not train the embeddings.", False)
    freeze_layers: int = key("Number of lower layers that are not trained.", 0, ge=0)
    fine_tune_type: Literal["sft", "lora", "bitfit"] | None = key(
        "What is trained: all weights (sft), adapters (lora), or biases alone (bitfit), and new weights in any case. "
        "Default lora where lora_r is given, else sft.",
        derive=lambda config: "sft" if config.lora_r is None else "lora")
    lora_r: int | None = key(
        "Rank of LoRA adapters. Default 8.", only=LORA, derive=lambda config: 8, ge=1, le=65_536)
    lora_alpha: int | None = key(
        "Scale, as alpha / r. Default 2 x r.", only=LORA, derive=lambda config: 2 * config.lora_r, ge=1)
    lora_dropout: float | None = key("Dropout. Default 0.", only=LORA, derive=lambda config: 0.0, ge=0, lt=1)
    lora_target_modules: Annotated[list[str] | str | None, NAME_OR_NAMES] = key(
        "Module names, or all-linear. Absent: peft's choice.", only=LORA, min_length=1)

    # Run
    output_dir: OutputPath = Field(min_length=1, description="Folder for all results, from the current folder.")
    overwrite_output_dir: bool = key(
        "Replace the run that output_dir holds. Otherwise a second run there is refused.", False)
    resume: Annotated[str, Location(folder=True, words=("auto",))] | None = key(
        "auto (newest checkpoint in output_dir, if any) or a folder.", min_length=1)
    resume_with_changes: bool = key(
        "Resume though model, data, loss, schedule or batch differ from the checkpoint's.", False,
        only=RESUMED)
    seed: int = key("Seed of new weights, data order, sampling and dropout.", 42, ge=0, lt=2**32)
    num_workers: int = key("Data loading processes beside each training process.", 2, ge=0)
    wait_minutes: float = key(
        "Minutes that a process waits for another, which reads data or writes a large model, before the run ends.",
        30.0, gt=0)

    # Steps
    epochs: int = key("Passes over the training data. Also written epoch.", 1, ge=1)
    batch_size: int = key("Per process and micro-batch: single pairs, or queries with their documents.", 32, ge=1)
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
    max_grad_norm: float | None = key("Clip the gradient to this L2 norm. Written out as None: no clipping.", 1.0, gt=0)
    warmup_proportion: float = key("Fraction of optimizer steps in which lr rises from 0.", 0.1, ge=0, le=1)
    stable_proportion: float = key(
        "Fraction of optimizer steps, after warmup, at full lr. Then cosine.", 0.0, ge=0, le=1)

    # Validation
    val_dataset: DatasetName | None = key(f"Validation data: {DATASET_HELP}. Absent: no validation.", min_length=1)
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

    @classmethod
    def resolved_entries(cls, values: Mapping[str, Any]) -> list[dict[str, Any]]:
        """For each training file of a finished configuration's values its path and its own keys."""
        return [{"path": values.get("train_dataset")}]

    def to_yaml(self) -> str:
        """Every key with its resolved value; `load_config` reads it back as an equal object."""
        return yaml.safe_dump(self.model_dump(), sort_keys=False, allow_unicode=True, width=10**6)

    def save(self, path: str | Path) -> None:
        Path(path).write_text(self.to_yaml(), encoding="utf-8")

    def problems(self) -> Iterator[tuple[str, str]]:
        """(key, message) for values that do not fit each other."""
        warmup, stable = self.warmup_proportion, self.stable_proportion
        if warmup + stable > 1 + 1e-9:  # 0.7 + 0.2 + 0.1 is not 1 in binary
            yield "stable_proportion", f"expected at most 1 with warmup_proportion, found {warmup:g} + {stable:g}"
        for name, value, library in LIBRARIES:
            if getattr(self, name) == value and find_spec(library) is None:
                yield name, f"{value} needs {library}; run: pip install -e '.[{value}]'"

