"""What the training of an embedder brings to a run: see `train.run.Training`."""

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator

from rag_retrieval.core.distributed import host_group
from rag_retrieval.data.store import RecordStore
from rag_retrieval.data.summary import TokenLengths
from rag_retrieval.losses.embedding import Flops, Objective, SelfDistillation, objective_of
from rag_retrieval.losses.unified import unified
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.embedding_files import read_settings
from rag_retrieval.models.representation_files import MAXSIM, MEAN_MAXSIM
from rag_retrieval.models.settings import ModelFiles, resolve_model_path
from rag_retrieval.train import run as any_run
from rag_retrieval.train.checkpoints import TrainState
from rag_retrieval.train.embedding.card import EMBEDDER
from rag_retrieval.train.embedding.config import EmbeddingConfig
from rag_retrieval.train.embedding.guide import open_guide
from rag_retrieval.train.embedding.run_data import (
    embedding_steps,
    open_training_files,
    report_steps,
    token_lengths,
)
from rag_retrieval.train.embedding.task import EmbeddingOptions, EmbeddingTask
from rag_retrieval.train.embedding.validation_data import best_metric, make_validation, open_validation
from rag_retrieval.train.run_data import DataSource
from rag_retrieval.train.setup import layout_of, report_layout
from rag_retrieval.train.steps import MixedSteps

logger = logging.getLogger(__name__)

# Without max_tokens_with_graph: what the graphs of a step may hold on a CPU, and on a GPU of its memory
CPU_GRAPH_BYTES, GPU_GRAPH_SHARE = 4 << 30, 0.5
# of a token in a layer, in hidden sizes; measured: 19.5 of a BERT with dropout (MiniLM-L6, packed)
KEPT_STATES = 20


def run(config: EmbeddingConfig) -> TrainState | None:
    """Train an embedder as configured: see `train.run.run`."""
    return any_run.run(EmbeddingTraining(config))


class EmbeddingTraining:
    card = EMBEDDER

    def __init__(self, config: EmbeddingConfig):
        self.config, self.objective = config, configured_objective(config)

    def open_data(self) -> list[DataSource]:
        self.files = open_training_files(self.config)
        self.guide = None
        if "guide" in self.objective.reads:
            stores = [file.store for file in self.files]
            config = self.config
            self.guide = open_guide(config.guide_model, stores, config.wait_minutes, config.trust_remote_code)
        sources = [
            DataSource("training", file.source, [*file.store.files, *filter(None, [file.teacher_vectors])], file.store)
            for file in self.files
        ]
        data = self.validation = open_validation(self.config)
        if data is not None:
            sources.append(DataSource("validation", self.config.val_dataset, data.files, data.store))
        return sources

    def load_model(self) -> EmbeddingModel:
        check_representations(self.config)
        return load_embedder(self.config)

    def token_lengths(self, store: RecordStore, model: EmbeddingModel) -> list[TokenLengths]:
        return token_lengths(store, model.text_encoder)

    def steps(self, model: EmbeddingModel, accelerator: Accelerator) -> MixedSteps:
        packs, max_tokens = layout_of(self.config, model, accelerator)
        report_layout(model, packs)
        for name, prompt in model.settings.prompts.items():
            logger.info("prompt of a %s, which is saved with the model: %r", name, prompt)
        steps = embedding_steps(self.files, self.config, model.text_encoder, accelerator, max_tokens, not packs)
        self.objective = with_ramp(self.objective, self.config, int(steps.steps_per_epoch * self.config.epochs))
        report_steps(self.files, self.config, steps)
        return steps

    def task(self, model: EmbeddingModel, adapter: Any, accelerator: Accelerator) -> tuple[EmbeddingTask, str | None]:
        config, validation = self.config, None
        if self.validation is not None:
            validation = make_validation(self.validation, config, model, accelerator, self.objective)
        packs, _ = layout_of(config, model, accelerator)
        kept = config.max_tokens_with_graph
        if kept is None:
            kept = graph_tokens(model, accelerator, config.gradient_checkpointing)
            logger.info("max_tokens_with_graph: about %s tokens of a step fit in memory with their activations; beyond "
                        "that a step is computed twice", f"{kept:,}")  # fmt: skip
        options = EmbeddingOptions(config.seed, kept, not packs, config.negatives_cross_device is not False)
        objectives = {file.name: self.objective for file in self.files}
        task = EmbeddingTask(
            model,
            objectives,
            validation,
            partial(load_embedder, config),
            partial(EmbeddingModel.from_pretrained, trust_remote_code=config.trust_remote_code),
            adapter,
            accelerator,
            options,
            host_group(config.wait_minutes),
            self.guide,
        )
        return task, best_metric(config, validation)


def configured_objective(config: EmbeddingConfig) -> Objective:
    """All but the ramp of FLOPS regularization where that depends on the run's steps: see `with_ramp`."""
    weights, options = config.loss_weights, config.loss_options
    objective = objective_of(weights, options, config.widths, config.width_weights, config.normalize)
    distillation = flops = None
    if config.use_self_distill:
        shared = {name: options[name] for name in ("temperature", "use_inbatch_neg") if name in options}
        distillation = SelfDistillation(config.self_distill_weights, config.self_distill_start_step, **shared)
    if config.lexical_method == "splade":
        flops = Flops(config.lambda_query, config.lambda_document, config.flops_ramp_steps or 0)
    return unified(
        objective,
        config.representations,
        config.representation_weights,
        config.ensemble_weights,
        distillation,
        flops,
        multi_vector_mean=config.mean_maxsim is not False,
    )


def with_ramp(objective: Objective, config: EmbeddingConfig, steps: int) -> Objective:
    """The weights of FLOPS regularization rise over the first third of a run of so many steps, unless it says more."""
    if objective.flops is None or config.flops_ramp_steps is not None:
        return objective
    return replace(objective, flops=replace(objective.flops, ramp_steps=max(1, steps // 3)))


def load_embedder(config: EmbeddingConfig) -> EmbeddingModel:
    """The model to train, weights in float32. Raises ValueError where model and configuration do not fit."""
    prompts = {"query": config.query_instruction, "document": config.document_instruction}
    dims, width = tuple(config.mrl_dims or ()), config.teacher_embedding_dim
    model = EmbeddingModel.from_pretrained(
        config.model_name_or_path,
        pooling=config.pooling,
        prompts={name: prompt for name, prompt in prompts.items() if prompt is not None},
        max_length=config.passage_max_len,
        query_max_length=config.query_max_len,
        include_prompt=config.include_prompt,
        cls_interval=config.cls_interval,
        normalize=config.normalize,
        bidirectional=config.bidirectional,
        representations=config.representations,
        lexical=config.lexical_method,
        colbert_dim=config.colbert_dim,
        query_expansion=config.query_expansion,
        attend_to_expansion_tokens=config.attend_to_expansion_tokens,
        skiplist_words=config.skiplist_words,
        dims=dims if width is None else (),  # the one projection is to the teacher's width
        trust_remote_code=config.trust_remote_code,
        attn_implementation=config.attn_implementation,
        cut_lengths=True,
    )
    lengths = {"passage_max_len": model.settings.max_length, "query_max_len": model.settings.query_max_length}
    for name, length in lengths.items():
        if length < getattr(config, name):
            if name in config.model_fields_set:
                raise ValueError(
                    f"{name} {getattr(config, name)} is more than the {length} tokens that this model has positions "
                    f"for; give {length} or fewer"
                )
            logger.info("%s: %d, the tokens that this model has positions for, as none is given", name, length)
    if config.mean_maxsim is not None:
        model.settings = replace(model.settings, similarity=MEAN_MAXSIM if config.mean_maxsim else MAXSIM)
    if len(config.representations) > 1:
        model.settings = replace(model.settings, ensemble_weights=config.ensemble_weights)
    if config.fix_encoder:
        model.model.requires_grad_(False)
    if not config.normalize:  # the loss compares by the product, so the saved model does
        model.settings = replace(model.settings, similarity="dot")
    if width is not None:
        model.add_projection(width)
        model.settings = replace(model.settings, dims=dims)
    if config.use_mrl and max(config.widths) < model.dim:
        logger.warning(
            "mrl_dims: a vector has %d numbers, of which those beyond %d are in no loss; add %d to mrl_dims, or cut "
            "the vectors in use",
            model.dim, max(config.widths), model.dim,
        )  # fmt: skip
    if config.use_mrl and config.mrl_dims is None:
        widths = sorted({min(width, model.dim) for width in config.widths})
        model.settings = replace(model.settings, dims=tuple(widths))
    return model


def check_representations(config: EmbeddingConfig) -> None:
    """Warns of what the model gives and is not trained. Raises ValueError where the configuration leaves to defaults
    what the model does in another way."""
    path = config.model_name_or_path
    saved = read_settings(ModelFiles(resolve_model_path(path)))
    lost = [name for name in saved["representations"] if name not in config.representations]
    if "dense" not in saved["representations"] and "representations" not in config.model_fields_set:
        names = ", ".join(saved["representations"])
        raise ValueError(f"representations: {path} gives {names} and no dense vector; name what is to be trained")
    if lost:
        logger.warning(
            "representations: %s also gives %s, which is not trained and not in the result", path, ", ".join(lost)
        )
    if "lexical_method" not in config.model_fields_set and config.lexical_method and saved["lexical"] == "splade":
        raise ValueError(f"lexical_method: that of {path} is splade; give splade, or linear for a new head")


def graph_tokens(model: EmbeddingModel, accelerator: Accelerator, checkpointed: bool) -> int:
    """Tokens whose graphs are about what a step may hold. checkpointed: of each layer its input alone is kept."""
    config, device = model.config.get_text_config(), accelerator.device
    layers = config.num_hidden_layers + KEPT_STATES if checkpointed else config.num_hidden_layers * KEPT_STATES
    value = 4 if accelerator.mixed_precision == "no" else 2
    memory = CPU_GRAPH_BYTES
    if device.type == "cuda":
        memory = GPU_GRAPH_SHARE * torch.cuda.get_device_properties(device).total_memory
    return int(memory / (layers * config.hidden_size * value))
