"""What pre-training brings to a run: see `train.run.Training`."""

import logging
from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
from accelerate import Accelerator

from rag_retrieval.core.distributed import host_group
from rag_retrieval.data.passages import Passages, open_passages
from rag_retrieval.losses.embedding import objective_of
from rag_retrieval.models.loading import NO_LIMIT
from rag_retrieval.train import run as any_run
from rag_retrieval.train.checkpoints import TrainState
from rag_retrieval.train.pretrain.card import PRETRAINED
from rag_retrieval.train.pretrain.config import PretrainConfig
from rag_retrieval.train.pretrain.model import DecodingOptions, PretrainingModel
from rag_retrieval.train.pretrain.task import LOSSES, PretrainTask
from rag_retrieval.train.pretrain.training_data import MaskingOptions, PretrainSteps
from rag_retrieval.train.run_data import DataSource
from rag_retrieval.train.setup import layout_of, report_layout
from rag_retrieval.train.steps import CarriedSteps, StepShape

logger = logging.getLogger(__name__)

LENGTH_SAMPLE = 1_000  # passages whose tokens are counted for the log
# a span is compared with every other span of the step
DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def run(config: PretrainConfig) -> TrainState | None:
    """Pre-train as configured: see `train.run.run`."""
    return any_run.run(PretrainTraining(config))


class PretrainTraining:
    card = PRETRAINED

    def __init__(self, config: PretrainConfig):
        self.config = config

    def open_data(self) -> list[DataSource]:
        config, self.validation = self.config, None
        self.passages = [open_passages(source, config.passage_tokens) for source in config.train_sources]
        pairs = zip(config.train_sources, self.passages, strict=True)
        sources = [DataSource("training", source, passages.files, None) for source, passages in pairs]
        if config.val_dataset is not None:
            self.validation = open_passages(config.val_dataset, config.passage_tokens)
            sources.append(DataSource("validation", config.val_dataset, self.validation.files, None))
        return sources

    def load_model(self) -> PretrainingModel:
        return load_encoder(self.config)

    def steps(self, model: PretrainingModel, accelerator: Accelerator) -> CarriedSteps:
        packs, _ = layout_of(self.config, model, accelerator)
        report_layout(model, packs)
        for source, passages in zip(self.config.train_sources, self.passages, strict=True):
            report_passages(source, passages, model)
        steps = training_steps(self.config, self.passages, model, accelerator)
        return CarriedSteps({"": steps}, self.config.epochs)

    def task(
        self, model: PretrainingModel, adapter: Any, accelerator: Accelerator
    ) -> tuple[PretrainTask, str | None]:
        config, validation, objective = self.config, None, None
        if self.validation is not None:
            validation = masked_steps(config, [self.validation], model, accelerator, len(self.validation))
        if config.loss_type == "span_pairs":
            objective = objective_of({"info_nce": 1.0}, {"temperature": config.temperature, "directions": DIRECTIONS})
        names = LOSSES[config.loss_type]
        task = PretrainTask(
            model,
            names if config.bag_of_words_weight else names[:2],
            objective,
            validation,
            partial(load_encoder, config),
            adapter,
            accelerator,
            config.seed,
            host_group(config.wait_minutes),
        )
        return task, None if validation is None else "loss"


def load_encoder(config: PretrainConfig) -> PretrainingModel:
    """The model to train. Raises ValueError where model and configuration do not fit."""
    decoding = None
    if config.loss_type == "retromae":
        decoding = DecodingOptions(config.decoder_mlm_probability, config.bag_of_words_weight)
    return PretrainingModel.from_pretrained(
        config.model_name_or_path,
        config.max_len,
        config.pooling,
        decoding,
        config.trust_remote_code,
        config.attn_implementation,
    )


def training_steps(
    config: PretrainConfig, passages: Sequence[Passages], model: PretrainingModel, accelerator: Accelerator
) -> PretrainSteps:
    """Of the whole run, full ones alone: what an epoch leaves over begins the next, and the last step is completed with
    passages of a further pass."""
    count = sum(map(len, passages))
    steps = masked_steps(config, passages, model, accelerator, config.epochs * count)
    size, number = steps.shape.step_size, steps.steps_per_epoch
    if size > count:
        logger.warning("a step has %s passages and the data %s: passages come several times in a step; a smaller "
                       "batch_size is enough", f"{size:,}", f"{count:,}")  # fmt: skip
    further = number * size - config.epochs * count
    logger.info("%s steps of %s passages; %s of them, of a further pass, complete the last step",
                f"{number:,}", f"{size:,}", f"{further:,}")  # fmt: skip
    return masked_steps(config, passages, model, accelerator, number * size)


def masked_steps(
    config: PretrainConfig,
    passages: Sequence[Passages],
    model: PretrainingModel,
    accelerator: Accelerator,
    records: int,
) -> PretrainSteps:
    """records: passages of all steps together."""
    packs, max_tokens = layout_of(config, model, accelerator)
    options = MaskingOptions(
        config.seed,
        config.loss_type,
        config.encoder_mlm_probability,
        model.tokenizer.mask_token_id,
        len(model.tokenizer),
        config.bag_of_words_weight > 0,
        max_tokens,
        not packs,
    )
    of_run = (config.batch_size, config.gradient_accumulation_steps, accelerator.num_processes)
    shape = StepShape(records, *of_run, accelerator.process_index)
    return PretrainSteps(passages, model.text_encoder, shape, options)


def report_passages(source: str, passages: Passages, model: PretrainingModel) -> None:
    """How many there are and how long, and which are cut by max_len."""
    sample = np.linspace(0, len(passages) - 1, min(len(passages), LENGTH_SAMPLE)).astype(int)
    encoded = model.text_encoder.encode([passages.text(int(place)) for place in sample], max_length=NO_LIMIT)
    lengths, limit = np.array([len(each) for each in encoded]), model.settings.max_length
    p50, p95, longest = np.percentile(lengths, [50, 95, 100], method="higher").tolist()
    logger.info("training data: %s: %s passages; of %s, tokens p50 %s, p95 %s, max %s",
                source, f"{len(passages):,}", f"{len(sample):,}", p50, p95, longest)  # fmt: skip
    cut = int((lengths > limit).sum())
    if cut and model.decoding is not None:
        logger.warning("%s: %.1f%% of the passages have more than max_len %d tokens, and lose their ends; lower "
                       "passage_tokens, or raise max_len", source, 100 * cut / len(lengths), limit)  # fmt: skip
