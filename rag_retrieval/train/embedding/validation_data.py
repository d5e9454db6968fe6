"""What an embedder is validated on: a BEIR folder or records, and what can be measured on them.

A query is searched in the whole corpus, or in the documents of all records. Records have a loss, too; graded pairs have
the correlation of similarities and labels in place of ranks.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator

from rag_retrieval.core.distributed import StartError
from rag_retrieval.data.beir import find_file, find_optional, find_qrels
from rag_retrieval.data.collection import Collection, beir_collection, is_beir_folder, store_collection
from rag_retrieval.data.records import RecordRules
from rag_retrieval.data.step_records import QUERY_MARK, first_of_each
from rag_retrieval.data.store import RecordStore, open_store
from rag_retrieval.losses.embedding import Objective
from rag_retrieval.losses.step_gradients import representation_gradients
from rag_retrieval.losses.step_targets import targets_of
from rag_retrieval.train.embedding.config import EmbeddingConfig
from rag_retrieval.train.embedding.rankings import TextScores
from rag_retrieval.train.embedding.representation_keys import split_metric
from rag_retrieval.train.embedding.shared_encoding import SharedEncoding
from rag_retrieval.train.embedding.text_outputs import Outputs, of_texts, on_device, step_outputs
from rag_retrieval.train.embedding.training_data import EmbeddingSteps, SamplingOptions, TrainingFile, records_of
from rag_retrieval.train.embedding.validation import METRICS, EmbeddingValidation
from rag_retrieval.train.run_folder import START_FILE
from rag_retrieval.train.setup import layout_of
from rag_retrieval.train.steps import StepShape

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ValidationData:
    """store: the records; None where there is a BEIR folder. files: those that it was read from."""

    collection: Collection
    store: RecordStore | None
    files: Sequence[Path]


def open_validation(config: EmbeddingConfig) -> ValidationData | None:
    """None where the configuration names no validation data. DataError for what is wrong in them."""
    source = config.val_dataset
    if source is None:
        return None
    if is_beir_folder(source):
        folder, split = Path(source), config.val_split
        files = [find_file(folder, "corpus.jsonl"), find_file(folder, "queries.jsonl"), find_qrels(folder, split)]
        pool = find_optional(folder, f"candidates.{split}.tsv")
        return ValidationData(beir_collection(folder, split), None, [*files, *filter(None, [pool])])
    rules = RecordRules(label_key=config.train_label_key, teacher_key=config.teacher_key, for_embedder=True)
    store = open_store(source, rules, split=config.val_split or "validation", group_by_query=True)
    return ValidationData(store_collection(store, source), store, store.files)


def make_validation(
    data: ValidationData, config: EmbeddingConfig, model: Any, accelerator: Accelerator, objective: Objective
) -> EmbeddingValidation:
    """Of a run with this configuration, objective and number of processes. On every process alike."""
    collection, store = data.collection, data.store
    packs, max_tokens = layout_of(config, model, accelerator)
    encoding = SharedEncoding(
        collection,
        model.text_encoder,
        accelerator,
        max_tokens=max_tokens,
        padded=not packs,
        batch_size=config.batch_size * config.train_group_size,
    )
    measures, names = {}, (split_metric(config.metric_for_best_model)[1], *METRICS)
    if store is not None and "label" in objective.reads:
        measures["spearman"], names = LabelCorrelation(store, objective), ()
    if store is not None and can_measure(objective, store):
        options = SamplingOptions(config.seed, config.train_group_size, shuffle=False)
        file = TrainingFile(config.val_dataset, "", store, config.record_kind, records_of(store, config.record_kind))
        records = EmbeddingSteps(file, model.text_encoder, StepShape(1, 1, 1), options)
        processes = 1 if config.negatives_cross_device is False else accelerator.num_processes
        step = config.batch_size * config.gradient_accumulation_steps * processes
        if len(file.records):
            # of the records alone, whatever the step: the same before and after self-distillation begins
            of_records = replace(objective, flops=None, self_distillation=None)
            measures["loss"] = RecordLoss(records, of_records, step, accelerator.device)
    return EmbeddingValidation(
        collection,
        encoding,
        objective=objective,
        names=[name for name in dict.fromkeys(names) if name not in ("loss", "spearman")],
        measures=measures,
        device=accelerator.device,
        start=Path(config.output_dir) / START_FILE if config.eval_on_start else None,
        widths=[width for width in objective.widths_of(model.dim)[0] if width < model.dim],
    )


def best_metric(config: EmbeddingConfig, validation: EmbeddingValidation | None) -> str | None:
    """What decides which checkpoint is best: the configured metric, or the first that the data can measure. Raises
    StartError where they measure none."""
    metric = config.metric_for_best_model
    if validation is None or metric in validation.metrics:
        return metric
    if not validation.metrics:
        raise StartError(
            f"val_dataset: {config.val_dataset} measures nothing: no query has a relevant document; give some that are "
            "relevant"
        )
    first = validation.metrics[0]
    message = "metric_for_best_model: %s cannot be measured on %s; %s decides which checkpoint is best"
    logger.warning(message, metric, config.val_dataset, first)
    return first


class LabelCorrelation:
    """Spearman's rank correlation of the scores of graded pairs with their labels, in [-1, 1]; 0 where all scores are
    equal. store: for embedders; what is given is of its collection."""

    def __init__(self, store: RecordStore, objective: Objective):
        self.labels, self.objective = store.labels, objective
        self.queries = torch.from_numpy(np.repeat(first_of_each(store.query_ids)[1], store.group_sizes))
        self.documents = torch.from_numpy(first_of_each(store.document_ids)[1])

    def __call__(self, queries: Outputs, documents: Outputs) -> float:
        from scipy.stats import spearmanr

        *_, scores = TextScores(self.objective, queries, documents).of_pairs(
            self.queries, self.documents.unsqueeze(1)
        ).values()
        similarities = scores.squeeze(1).numpy()
        if np.ptp(similarities) == 0 or np.ptp(self.labels) == 0:
            return 0.0
        return float(spearmanr(similarities, self.labels).statistic)


class RecordLoss:
    """The mean training loss of the records, in steps of `records_per_step` as the first pass over the file, in its
    order, shows them; the last step may be short. Records of one step are each other's negatives.

    steps: of the validation records. objective: whose losses need neither a guide nor a teacher's vectors.
    """

    def __init__(self, steps: EmbeddingSteps, objective: Objective, records_per_step: int, device: torch.device):
        self.steps, self.objective, self.records_per_step, self.device = steps, objective, records_per_step, device
        store = steps.store
        # of the rows of the vectors: distinct texts in the order of the file
        self.query_ids = store.query_ids[first_of_each(store.query_ids)[0]] ^ QUERY_MARK
        self.document_ids = store.document_ids[first_of_each(store.document_ids)[0]]
        self.orders = np.argsort(self.query_ids), np.argsort(self.document_ids)

    def __call__(self, queries: Outputs, documents: Outputs) -> float:
        total, count = 0.0, len(self.steps.file.records)
        for start in range(0, count, self.records_per_step):
            places = range(start, min(start + self.records_per_step, count))
            records = self.steps.step_records([self.steps.example(0, place) for place in places])
            query_ids = np.unique(records.query_ids)
            document_ids = np.unique(np.concatenate([records.positive_ids, records.negative_ids]))
            targets = targets_of(query_ids, document_ids, [records]).to(self.device)
            sides = zip((queries, documents), self._rows(query_ids, document_ids), strict=True)
            chosen = (on_device(of_texts(side, torch.from_numpy(rows)), self.device) for side, rows in sides)
            outputs = map(step_outputs, chosen)
            total += representation_gradients(self.objective, *outputs, targets, 1.0).losses.sum().item()
        return total / count

    def _rows(self, *wanted: np.ndarray) -> list[np.ndarray]:
        known = zip((self.query_ids, self.document_ids), self.orders, wanted, strict=True)
        return [order[np.searchsorted(ids, those, sorter=order)] for ids, order, those in known]


def can_measure(objective: Objective, store: RecordStore) -> bool:
    """Whether the loss can be taken of validation records: without a guide and without a teacher's vectors, and with a
    score of every document where it learns from a teacher's scores."""
    scores = store.teacher_scores
    has_scores = scores is not None and bool(np.isfinite(scores).all())
    return not objective.reads & ({"guide", "teacher_vectors"} | (set() if has_scores else {"teacher_score"}))
