"""LoRA adapters, and what a run writes of its weights: a whole model, or an adapter that is merged at the end."""

import logging
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from rag_retrieval.train.config import TrainingConfig


def add_lora(model: PreTrainedModel, new_parameters: set[str], config: TrainingConfig) -> Any:
    """Put LoRA adapters into the model in place; new modules, such as a head, train in full. Returns peft's wrapper.

    Raises ValueError where the model has no module that is to get one, or none of that rank.
    """
    from peft import LoraConfig, TaskType, get_peft_model

    kinds = {"ForSequenceClassification": TaskType.SEQ_CLS, "ForCausalLM": TaskType.CAUSAL_LM}
    matching = [kind for ending, kind in kinds.items() if type(model).__name__.endswith(ending)]
    check_lora(model, config)
    trained_in_full = outermost_new_modules(model, new_parameters)
    in_heads = [name for name, _ in linear_layers(model) if is_within(name, trained_in_full)]
    frozen = [name for name, layer in linear_layers(model) if not layer.weight.requires_grad]
    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        exclude_modules=frozen + (in_heads if config.lora_target_modules == "all-linear" else []) or None,
        modules_to_save=trained_in_full or None,
        task_type=matching[0] if matching else TaskType.FEATURE_EXTRACTION,
    )
    return get_peft_model(model, settings)


def check_lora(model: PreTrainedModel, config: TrainingConfig) -> None:
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING

    family, hidden = model.config.model_type, model.config.get_text_config().hidden_size
    if config.lora_r > hidden:
        raise ValueError(f"lora_r: {config.lora_r} is more than the model's {hidden} hidden units; usual are 8 to 64")
    wanted = config.lora_target_modules
    names = {name for name, _ in model.named_modules()}
    missing = [] if wanted is None or isinstance(wanted, str) else [
        each for each in wanted if not any(name == each or name.endswith(f".{each}") for name in names)
    ]  # fmt: skip
    if missing:
        what = f"the model has no {', '.join(missing)}"
    elif wanted is None and family not in TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING:
        what = f"peft has no choice for the family {family}"
    else:
        return
    own = sorted({name.rpartition(".")[2] for name, _ in linear_layers(model)})
    raise ValueError(f"lora_target_modules: {what}; give some of {', '.join(own)}, or all-linear")


def linear_layers(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    return ((name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear))


def outermost_new_modules(model: nn.Module, new_parameters: set[str]) -> list[str]:
    """Names of the modules all of whose parameters are new, without those within another; of a module that has other
    parameters too, the module itself. peft saves a module under its own name, and one within another not at all."""
    modules: list[str] = []
    for name, module in model.named_modules():
        own = {f"{name}.{parameter}" for parameter, _ in module.named_parameters()}
        direct = {f"{name}.{parameter}" for parameter, _ in module.named_parameters(recurse=False)}
        if (own and own <= new_parameters or direct & new_parameters) and not is_within(name, modules):
            modules.append(name)
    return sorted(modules)


def is_within(name: str, modules: list[str]) -> bool:
    return any(name == module or name.startswith(f"{module}.") for module in modules)


class SavedModel:
    """What a task writes of its model: the part of `train.task.Task` that is the same for all trainers.

    model: the module that is trained, whose `model` is that of Hugging Face, with `save_pretrained(folder, state)`, and
    `save_heads(folder, state)` and `load_heads(folder)` where it has parameters outside of `model`.
    load_base: loads it as it was before training, for merging an adapter into. adapter: peft's wrapper around
    `model.model`, if any. With one, `save_model` writes the adapter alone.
    """

    def __init__(self, model: Any, load_base: Callable[[], Any], adapter: Any = None):
        self.model, self.load_base, self.adapter = model, load_base, adapter

    def save_model(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        """state_dict: of `model`, whose names have `model.` before those of the Hugging Face model."""
        if self.adapter is None:
            self.model.save_pretrained(folder, state_dict)
            return
        own = {name: value for name, value in state_dict.items() if name.startswith("model.")}
        named = {f"base_model.{name}": value for name, value in own.items()}  # as peft names them
        # embeddings are never trained here; by itself peft asks the hub whether they changed
        self.adapter.save_pretrained(folder, state_dict=named, save_embedding_layers=False)
        if len(own) < len(state_dict):
            self.model.save_heads(folder, state_dict)

    def load_model(self, folder: Path) -> None:
        """Weights of a folder that `save_model` wrote, one file or shards, into the model."""
        if self.adapter is None:
            bare = self.model.model
            saved = type(bare).from_pretrained(folder, dtype=bare.dtype, config=bare.config)
            bare.load_state_dict(saved.state_dict())
            self.load_heads(self.model, folder)
            return
        from peft import load_peft_weights, set_peft_model_state_dict

        device = str(next(self.adapter.parameters()).device)
        result = set_peft_model_state_dict(self.adapter, load_peft_weights(str(folder), device=device))
        if result.unexpected_keys:
            raise ValueError(f"{folder}: the model has no {', '.join(result.unexpected_keys[:3])}")
        self.load_heads(self.model, folder)

    def load_heads(self, model: Any, folder: Path) -> None:
        """Into the parameters that `model` has outside of the Hugging Face model, if any."""
        if any(not name.startswith("model.") for name, _ in model.named_parameters()):
            model.load_heads(folder)

    def export(self, folder: Path, results: Path) -> None:
        """`model`, and for LoRA `adapter` with the adapter merged into the former. The trained model itself cannot be
        merged: a sharding engine holds only a part of it on each process."""
        shutil.copytree(folder, results / ("model" if self.adapter is None else "adapter"))
        if self.adapter is None:
            return
        from peft import PeftModel

        with quiet_loading():  # the adapter brings the head
            base = self.load_base()
            base.model = PeftModel.from_pretrained(base.model, str(folder)).merge_and_unload()
            self.load_heads(base, folder)
            base.save_pretrained(results / "model")

    def rehearse(self) -> None:
        """Save, load and merge an adapter that has learned nothing yet, which changes no weight: what fails at the end
        fails before the first step. Raises ValueError."""
        if self.adapter is None:
            return
        try:
            with tempfile.TemporaryDirectory() as folder:
                self.save_model(Path(folder), self.model.state_dict())
                self.load_model(Path(folder))
            self.adapter.merge_adapter()
            self.adapter.unmerge_adapter()
        except Exception as error:
            name = type(self.model.model).__name__
            raise ValueError(
                f"lora_r: the adapter of this {name} cannot be saved, loaded and merged "
                f"({type(error).__name__}: {error}); give other lora_target_modules, or train without LoRA"
            ) from error


@contextmanager
def quiet_loading() -> Iterator[None]:
    """Without what loading says of a model that this run has loaded before."""
    loading = logging.getLogger("rag_retrieval.models.loading")
    level = loading.level
    loading.setLevel(logging.ERROR)
    try:
        yield
    finally:
        loading.setLevel(level)
