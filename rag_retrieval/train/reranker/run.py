"""What the training of a reranker brings to a run: see `train.run.Training`."""

import logging
from functools import partial
from typing import Any

from accelerate import Accelerator

from rag_retrieval.core.distributed import StartError
from rag_retrieval.data.store import RecordStore
from rag_retrieval.data.summary import TokenLengths
from rag_retrieval.metrics import LOGGED_METRICS
from rag_retrieval.models.cross_encoder import CrossEncoder
from rag_retrieval.models.llm_decoder import LLMDecoder
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.settings import FORMAT_NAMES, YES_NO_NAMES
from rag_retrieval.train import run as any_run
from rag_retrieval.train.checkpoints import TrainState
from rag_retrieval.train.reranker.card import RERANKER
from rag_retrieval.train.reranker.config import RerankerConfig
from rag_retrieval.train.reranker.objective import configured_objective
from rag_retrieval.train.reranker.run_data import open_training_files, open_validation
from rag_retrieval.train.reranker.task import RerankerTask
from rag_retrieval.train.reranker.training_data import SamplingOptions, TrainingSteps
from rag_retrieval.train.reranker.validation import Validation
from rag_retrieval.train.run_data import DataSource, report_mix, sampled_pairs
from rag_retrieval.train.setup import layout_of, report_layout
from rag_retrieval.train.steps import MixedSteps, StepShape

logger = logging.getLogger(__name__)


def run(config: RerankerConfig) -> TrainState | None:
    """Train a reranker as configured: see `train.run.run`."""
    return any_run.run(RerankerTraining(config))


class RerankerTraining:
    card = RERANKER

    def __init__(self, config: RerankerConfig):
        self.config = config

    def open_data(self) -> list[DataSource]:
        self.files = open_training_files(self.config)
        sources = [DataSource("training", one.config.train_dataset, one.store.files, one.store) for one in self.files]
        store = self.validation_store = open_validation(self.config)
        if store is not None:
            sources.append(DataSource("validation", self.config.val_dataset, store.files, store))
        return sources

    def load_model(self) -> PairScorer:
        return load_scorer(self.config)

    def token_lengths(self, store: RecordStore, model: PairScorer) -> list[TokenLengths]:
        """Of all pairs or of a sample of them."""
        places, sampled = sampled_pairs(store)
        pairs = [store.pair(int(place)) for place in places]
        lengths = model.pair_encoder.untruncated_lengths([(pair.query, pair.document) for pair in pairs])
        return [TokenLengths("pair", lengths, model.pair_encoder.max_length, sampled)]

    def steps(self, model: PairScorer, accelerator: Accelerator) -> MixedSteps:
        """The steps of all files, which take turns. Each file draws random numbers of its own, the first those of the
        seed."""
        packs, max_tokens = layout_of(self.config, model, accelerator)
        report_layout(model, packs)
        sets = {}
        for position, file in enumerate(self.files):
            alone = file.config
            shape = StepShape(
                records=file.records_per_epoch,
                batch_size=alone.batch_size,
                accumulation=self.config.gradient_accumulation_steps,
                processes=accelerator.num_processes,
                process_index=accelerator.process_index,
            )
            options = SamplingOptions(
                self.config.seed + position,
                alone.train_group_size,
                alone.min_label,
                alone.max_label,
                self.config.shuffle_rate,
                max_tokens,
                padded=not packs,
                shares_queries=packs and model.causal,
            )
            source, encoder = alone.train_dataset, model.pair_encoder
            sets[file.name] = TrainingSteps(file.store, source, encoder, file.objective, shape, options, file.name)
        steps = MixedSteps(sets)
        report_mix(self.files, steps)
        return steps

    def task(self, model: PairScorer, adapter: Any, accelerator: Accelerator) -> tuple[RerankerTask, str | None]:
        validation = self._validation(model, accelerator)
        objectives = {file.name: file.objective for file in self.files}
        task = RerankerTask(model, objectives, validation, partial(load_scorer, self.config), adapter)
        return task, best_metric(self.config, validation)

    def _validation(self, model: PairScorer, accelerator: Accelerator) -> Validation | None:
        config = self.config
        if self.validation_store is None:
            return None
        chosen = config.metric_for_best_model
        names = [*LOGGED_METRICS, *([chosen] if chosen not in ("loss", "pair_accuracy", *LOGGED_METRICS) else [])]
        pairs_per_batch = config.batch_size * (config.train_group_size or 1)
        packs, max_tokens = layout_of(config, model, accelerator)
        return Validation(
            self.validation_store,
            model.pair_encoder,
            configured_objective(config),
            (config.min_label, config.max_label),
            pairs_per_batch,
            accelerator,
            names,
            max_tokens,
            padded=not packs,
        )


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
        return CrossEncoder.from_pretrained(
            config.model_name_or_path, **shared, split_special_tokens=config.split_special_tokens
        )
    texts = {name: getattr(config, name) for name in (*FORMAT_NAMES, *YES_NO_NAMES, "head", "start_layer")}
    return LLMDecoder.from_pretrained(config.model_name_or_path, **(shared | texts))


def best_metric(config: RerankerConfig, validation: Validation | None) -> str | None:
    """What decides which checkpoint is best: the configured metric, or the loss where the data cannot measure that.
    Raises StartError where they measure neither."""
    metric = config.metric_for_best_model
    if validation is None or metric in validation.metrics:
        return metric
    if validation.lacks_teacher:
        raise StartError(
            f"val_dataset: {config.val_dataset}: some document has no {config.teacher_score_key}, so that the "
            f"validation loss, for metric_for_best_model {metric}, cannot be measured; give every document one, or "
            "take a ranking metric that the data allow"
        )
    if "loss" not in validation.metrics:
        raise StartError(
            f"val_dataset: {config.val_dataset} measures nothing: no group has documents of different labels; "
            "give documents that are relevant and documents that are not"
        )
    logger.warning(
        "metric_for_best_model: %s cannot be measured on %s, where no query has several documents with a "
        "relevant one among them; the validation loss decides which checkpoint is best",
        metric,
        config.val_dataset,
    )
    return "loss"
