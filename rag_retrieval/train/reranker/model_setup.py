"""The model of a run as the configuration asks for it: loaded, partly frozen, with LoRA; its optimizer.

What a reader would get wrong: LoRA comes before freezing, because peft decides anew what is trainable.
"""

import logging

import torch
from torch import nn
from transformers import AttentionInterface, PreTrainedModel

from rag_retrieval.models.cross_encoder import CrossEncoder
from rag_retrieval.models.llm_decoder import LLMDecoder
from rag_retrieval.models.packed_model import ATTENTION, packed_attention
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.settings import FORMAT_NAMES, YES_NO_NAMES
from rag_retrieval.train.optim import make_adamw, parameter_groups
from rag_retrieval.train.reranker.config import RerankerConfig

logger = logging.getLogger(__name__)


def load_scorer(config: RerankerConfig) -> PairScorer:
    """The model to train, weights in float32. Raises ValueError where model and configuration do not fit."""
    shared = {
        "query_format": config.query_format,
        "document_format": config.document_format,
        "max_length": config.max_len,
        "trust_remote_code": config.trust_remote_code,
        "attn_implementation": config.attn_implementation,
    }
    if config.model_type == "bert_encoder":
        return CrossEncoder.from_pretrained(config.model_name_or_path, **shared)
    texts = {name: getattr(config, name) for name in (*FORMAT_NAMES, *YES_NO_NAMES, "head", "start_layer")}
    return LLMDecoder.from_pretrained(config.model_name_or_path, **(shared | texts))


def prepare_for_training(scorer: PairScorer, config: RerankerConfig):
    """Freeze, checkpoint gradients and add LoRA in place. Returns the LoRA wrapper, or None without LoRA."""
    model = scorer.model
    adapter = add_lora(scorer, config) if config.lora_r else None  # first: it makes all else untrainable
    if config.freeze_embeddings:
        freeze(embeddings_of(model))
    for layer in lower_layers(model, config.freeze_layers):
        freeze(layer)
    if config.gradient_checkpointing:
        # transformers renamed it between 5.17 and 5.23
        enable = (
            getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        )
        # the reentrant form needs inputs with gradients, which frozen embeddings and LoRA do not have
        enable({"use_reentrant": False})
    if config.torch_compile:
        compile_layers(model)
    return adapter


def compile_layers(model: PreTrainedModel) -> None:
    """Compile every transformer layer in place, once for all lengths; attention stays as it is.

    Traced into our attention, the compiler would begin anew for every batch, whose segments are Python numbers.
    """
    AttentionInterface.register(ATTENTION, torch.compiler.disable(packed_attention))
    for layer in transformer_layers(model):
        layer.compile(dynamic=True)


def freeze(module: nn.Module) -> None:
    module.requires_grad_(False)


def backbone_of(model: PreTrainedModel) -> nn.Module:
    return getattr(model, model.base_model_prefix)


def embeddings_of(model: PreTrainedModel) -> nn.Module:
    """Token embeddings with whatever the family adds to them (positions, segments, their norm)."""
    backbone = backbone_of(model)
    return getattr(backbone, "embeddings", None) or backbone.get_input_embeddings()


def transformer_layers(model: PreTrainedModel) -> list[nn.Module]:
    """From the input on; none where the family keeps them in another way than all others."""
    depth = model.config.get_text_config().num_hidden_layers
    stacks = [module for module in backbone_of(model).modules() if isinstance(module, nn.ModuleList)]
    return next((list(stack) for stack in stacks if len(stack) == depth), [])


def lower_layers(model: PreTrainedModel, count: int) -> list[nn.Module]:
    """The `count` transformer layers nearest to the input. Raises ValueError when the model has no more."""
    layers = transformer_layers(model)
    if count and count >= len(layers):
        raise ValueError(
            f"freeze_layers {count}: this model has {len(layers)} layers; at least one must stay trainable"
        )
    return layers[:count]


def add_lora(scorer: PairScorer, config: RerankerConfig):
    """Put LoRA adapters into the model; the head, and whatever else is new, trains in full."""
    from peft import LoraConfig, TaskType, get_peft_model

    settings = LoraConfig(
        r=config.lora_r,
        lora_alpha=config.lora_alpha,
        lora_dropout=config.lora_dropout,
        target_modules=config.lora_target_modules,
        modules_to_save=sorted({name.rpartition(".")[0] for name in scorer.new_parameters}) or None,
        task_type=TaskType.CAUSAL_LM if config.head == "yes_no" else TaskType.SEQ_CLS,
    )
    return get_peft_model(scorer.model, settings)


def new_parameter_names(scorer: PairScorer) -> set[str]:
    """Names, as the scorer has them, of newly initialised parameters that are trained in full."""
    return {
        name
        for name, _ in scorer.named_parameters()
        if name.removeprefix("model.").replace(".modules_to_save.default", "") in scorer.new_parameters
    }


def make_optimizer(scorer: PairScorer, config: RerankerConfig) -> torch.optim.Optimizer:
    new = new_parameter_names(scorer)
    groups = list(parameter_groups(scorer, config.lr, config.head_lr, new, config.weight_decay))
    if new:
        logger.info(
            "newly initialised, trained with head_lr %.1e: %s", config.head_lr, ", ".join(sorted(new))
        )
    else:
        logger.info("the model brings its own head: head_lr is not used")
    return make_adamw(groups, (config.adam_beta1, config.adam_beta2), config.adam_epsilon)


def describe_parameters(scorer: PairScorer) -> str:
    total = sum(parameter.numel() for parameter in scorer.parameters())
    trained = sum(parameter.numel() for parameter in scorer.parameters() if parameter.requires_grad)
    return f"{type(scorer.model).__name__}, {total / 1e6:.1f}M parameters, {trained / 1e6:.1f}M trained"
