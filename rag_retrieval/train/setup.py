"""The model of a run as the configuration asks for it: partly frozen, with LoRA, compiled; its optimizer, and how its
batches are laid out.

`model` here is the module that is trained: its `model` is a Hugging Face model, and its `new_parameters` name, as that
has them, the parameters that no checkpoint gave.
"""

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from accelerate import Accelerator
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from rag_retrieval.models.cpu_products import fast_products
from rag_retrieval.models.packed_attention import ATTENTION, packed_attention
from rag_retrieval.models.packed_model import attention_dropout
from rag_retrieval.train.config import TrainingConfig
from rag_retrieval.train.lora import add_lora
from rag_retrieval.train.optim import make_adamw, parameter_groups

logger = logging.getLogger(__name__)

# of a forward pass on a CPU: enough to keep its cores busy; padded, little enough to waste no padding
CPU_PACKED_TOKENS, CPU_PADDED_TOKENS = 2048, 1024


def products_of(config: TrainingConfig, accelerator: Accelerator) -> AbstractContextManager:
    """What multiplies in float32 linear layers while the run trains; compiled layers choose by themselves."""
    return nullcontext() if config.torch_compile else fast_products(accelerator.device)


def prepare_for_training(model: Any, config: TrainingConfig, accelerator: Accelerator) -> Any:
    """Freeze, checkpoint gradients and add LoRA in place. Returns peft's wrapper, or None without LoRA."""
    bare = model.model
    # first: peft makes all else untrainable
    adapter = add_lora(bare, model.new_parameters, config) if config.fine_tune_type == "lora" else None
    if config.fine_tune_type == "bitfit":
        train_biases_alone(model)
    if config.freeze_embeddings:
        embeddings_of(bare).requires_grad_(False)
    for layer in lower_layers(bare, config.freeze_layers):
        layer.requires_grad_(False)
    if config.gradient_checkpointing:
        # transformers renamed it between 5.17 and 5.23
        enable = getattr(bare, "activation_checkpointing_enable", None) or bare.gradient_checkpointing_enable
        # the backward pass computes layers again outside of what the step entered; compiled layers take no context
        contexts = {"context_fn": lambda: (nullcontext(), products_of(config, accelerator))}
        # the reentrant form needs inputs with gradients, which frozen embeddings and LoRA do not have
        enable({"use_reentrant": False} | ({} if config.torch_compile else contexts))
    if config.torch_compile:
        compile_layers(bare)
    return adapter


def train_biases_alone(model: Any) -> None:
    """BitFit: Ben Zaken et al., "BitFit: Simple Parameter-efficient Fine-tuning" (2022). New parameters are trained as
    well. Raises ValueError for a model without biases."""
    new = new_parameter_names(model)
    biases = {name for name, _ in model.named_parameters() if name.rpartition(".")[2] == "bias"}
    if not biases - new:
        raise ValueError(f"fine_tune_type bitfit: a {type(model.model).__name__} has no biases; give lora or sft")
    for name, parameter in model.named_parameters():
        if name not in biases | new:
            parameter.requires_grad_(False)


def compile_layers(model: PreTrainedModel) -> None:
    """Compile every transformer layer in place, once for all lengths; attention stays as it is.

    Traced into our attention, it would be recompiled for every batch, whose segments are Python numbers.
    """
    AttentionInterface.register(ATTENTION, torch.compiler.disable(packed_attention))
    for layer in transformer_layers(model):
        layer.compile(dynamic=True)


def backbone_of(model: PreTrainedModel) -> nn.Module:
    return getattr(model, model.base_model_prefix, model)  # a model without a head is one itself


def embeddings_of(model: PreTrainedModel) -> nn.Module:
    """Token embeddings with whatever the family adds to them (positions, segments, their norm)."""
    backbone = backbone_of(model)
    return getattr(backbone, "embeddings", None) or backbone.get_input_embeddings()


def transformer_layers(model: PreTrainedModel) -> list[nn.Module]:
    """From the input on; none where the family keeps them in another way, or shares the weights of all."""
    depth = model.config.get_text_config().num_hidden_layers
    stacks = [module for module in backbone_of(model).modules() if isinstance(module, nn.ModuleList)]
    return next((list(stack) for stack in stacks if len(stack) == depth), [])


def lower_layers(model: PreTrainedModel, count: int) -> list[nn.Module]:
    """The `count` transformer layers nearest to the input. Raises ValueError when the model has no more."""
    layers = transformer_layers(model) if count else []
    if count and not layers:
        raise ValueError(
            f"freeze_layers: a {type(model).__name__} has no separate layers: they share one set of weights, or are "
            "kept in a form that is not known here; leave freeze_layers out, or use freeze_embeddings"
        )
    if count and count >= len(layers):
        raise ValueError(f"freeze_layers {count}: this model has {len(layers)} layers; one at least must be trained")
    return layers[:count]


def new_parameter_names(model: Any) -> set[str]:
    """Names, as `model` has them, of newly initialised parameters that are trained in full."""
    return {
        name
        for name, _ in model.named_parameters()
        if name.removeprefix("model.").replace(".modules_to_save.default", "") in model.new_parameters
    }


def make_optimizer(model: Any, config: TrainingConfig) -> torch.optim.Optimizer:
    new = new_parameter_names(model)
    groups = list(parameter_groups(model, config.lr, config.head_lr, new, config.weight_decay))
    if new:
        logger.info("newly initialised, trained with head_lr %.1e: %s", config.head_lr, ", ".join(sorted(new)))
    else:
        logger.info("no newly initialised weights: head_lr is not used")
    return make_adamw(groups, (config.adam_beta1, config.adam_beta2), config.adam_epsilon)


def describe_parameters(model: Any) -> str:
    total = sum(parameter.numel() for parameter in model.parameters())
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    return f"{type(model.model).__name__}, {total / 1e6:.1f}M parameters, {trained / 1e6:.1f}M trained"


def layout_of(config: TrainingConfig, model: Any, accelerator: Accelerator) -> tuple[bool, int | None]:
    """Whether batches are packed, and the most tokens of a forward pass (None: any)."""
    with accelerator.autocast():  # on a GPU, packing takes half precision
        packs = model.packs
    max_tokens = config.max_tokens_per_batch
    if max_tokens is None and accelerator.device.type == "cpu":
        max_tokens = CPU_PACKED_TOKENS if packs else CPU_PADDED_TOKENS
    return packs, max_tokens


def report_layout(model: Any, packs: bool) -> None:
    if not packs:
        reason = model.packing_problem or "no kernel for variable lengths in this precision on this device"
        logger.info("batches are padded: %s", reason)
        return
    rate = attention_dropout(model.model)
    note = f"; the attention dropout of {rate} in its config is not applied" if rate else ""
    logger.info("batches are packed, without padding%s", note)
