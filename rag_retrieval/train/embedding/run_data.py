"""The data of an embedder's run: opened, checked, and laid out as steps."""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator

from rag_retrieval.data.records import RecordRules
from rag_retrieval.data.store import RecordStore, open_store
from rag_retrieval.data.summary import TokenLengths, summary
from rag_retrieval.models.loading import NO_LIMIT
from rag_retrieval.train.embedding.config import EmbeddingConfig
from rag_retrieval.train.embedding.training_data import EmbeddingSteps, SamplingOptions, TrainingFile, records_of
from rag_retrieval.train.run_data import distinct_names, sampled_pairs
from rag_retrieval.train.steps import CarriedSteps, StepShape

logger = logging.getLogger(__name__)


def open_training_files(config: EmbeddingConfig) -> list[TrainingFile]:
    """The memory-mapped training data, in the order of the configuration; one process of a machine builds what is
    missing. Data that can teach the loss nothing are refused."""
    sources, vectors = config.train_files, config.train_dataset_vec or [None] * len(config.train_files)
    files = enumerate(zip(sources, distinct_names(sources), vectors, strict=True))
    return [open_training_file(config, *file, config.seed + position) for position, file in files]


def open_training_file(
    config: EmbeddingConfig, source: str, name: str, vectors: str | None, seed: int
) -> TrainingFile:
    alone, (low, high) = config.record_kind == "teacher_vectors", config.losses[0].label_range or (None, None)
    rules = RecordRules(
        label_key=config.train_label_key,
        min_label=low,
        max_label=high,
        teacher_key=config.teacher_key,
        needs_teacher=config.reads_teacher,
        for_embedder=True,
        texts_alone=alone,
    )
    store = open_store(source, rules, split=config.train_split, group_by_query=not alone)
    if config.record_kind == "positives":
        check_positives(config, source, store)
    elif config.record_kind == "label" and np.ptp(store.labels) == 0:
        raise ValueError(
            f"train_dataset: {source}: all labels are {store.labels[0]:g}, so {config.loss_type} has nothing to learn; "
            "give pairs of different labels"
        )
    if alone:
        check_vectors(config, source, store, Path(vectors))
    records = records_of(store, config.record_kind, config.max_example_num_per_dataset, seed)
    return TrainingFile(source, name, store, config.record_kind, records, Path(vectors) if alone else None)


def check_positives(config: EmbeddingConfig, source: str, store: RecordStore) -> None:
    """Queries that teach nothing, and labels that are not read, are reported; raises ValueError where there are no
    other queries."""
    queries, usable = store.num_groups, len(records_of(store, "positives"))
    report_idle(source, queries - usable, queries, "no positive document", config.loss_type, "and are left out",
                "give each query a document that answers it, in pos or with a label above those of the others")
    for loss in config.losses:
        if loss.reads == "teacher_score":
            alone = int((store.group_sizes == 1).sum())
            report_idle(source, alone, queries, "one document alone", loss.name, f"and teach {loss.name} nothing",
                        "give each query several documents with scores")
    levels = {level for bounds in summary(store).label_histogram for level in bounds[:2]}
    if not config.reads_teacher and not levels <= {0.0, 1.0}:
        logger.warning("%s: %s reads which documents are positives, and nothing else of labels and scores "
                       "(kl_distillation learns from scores, cosent from grades)", source, config.loss_type)


def report_idle(source: str, idle: int, queries: int, fault: str, loss: str, effect: str, remedy: str) -> None:
    counts = f"{idle:,} of {queries:,} queries have {fault}"
    if idle == queries:
        raise ValueError(f"train_dataset: {source}: {counts}, so {loss} has nothing to learn; {remedy}")
    if idle:
        logger.warning("%s: %s %s", source, counts, effect)


def check_vectors(config: EmbeddingConfig, source: str, store: RecordStore, path: Path) -> None:
    """Raises ValueError where the file is not a row for each text."""
    size, texts, width = path.stat().st_size, store.num_groups, config.teacher_embedding_dim
    if size != 4 * texts * width:
        raise ValueError(
            f"train_dataset_vec: {path} has {size:,} bytes; expected {texts:,} texts x {width} x 4 bytes: raw float32 "
            f"without a header, one row for each text of {source}, in its order"
        )


def embedding_steps(
    files: list[TrainingFile],
    config: EmbeddingConfig,
    encoder: Any,
    accelerator: Accelerator,
    max_tokens: int | None,
    padded: bool,
) -> CarriedSteps:
    """The steps of all files, which take turns. Each file draws random numbers of its own.

    encoder: the model's `text_encoder`. max_tokens, padded: see `plan_by_tokens`.
    """
    sets, stores = {}, [file.store for file in files]
    for position, file in enumerate(files):
        options = SamplingOptions(config.seed + position, config.train_group_size, config.shuffle, max_tokens, padded)
        shape = step_shape(config, file, accelerator.num_processes, accelerator.process_index)
        sets[file.name] = EmbeddingSteps(file, encoder, shape, options, stores)
    return CarriedSteps(sets, config.epochs)


def step_shape(config: EmbeddingConfig, file: TrainingFile, processes: int, process_index: int) -> StepShape:
    """Of the whole run over a file: full steps alone. What an epoch leaves over begins the next, and the last step is
    completed with records of a further pass."""
    wanted = config.epochs * len(file.records)
    shape = StepShape(wanted, config.batch_size, config.gradient_accumulation_steps, processes, process_index)
    return replace(shape, records=shape.steps_per_epoch * shape.step_size)


def report_steps(files: list[TrainingFile], config: EmbeddingConfig, steps: CarriedSteps) -> None:
    """How files share the steps of the run, and how its last step is completed."""
    for file in files:
        own = steps.sets[file.name]
        count, records = own.steps_per_epoch, own.shape.records
        further = records - config.epochs * len(file.records)
        if own.shape.step_size > len(file.records):
            logger.warning("%s: a step has %s records and the file %s: records come several times in a step; a smaller "
                           "batch_size is enough", file.source, own.shape.step_size, len(file.records))
        line = f"{count:,} steps of {records // count:,} records. What an epoch leaves over begins the next one"
        if further:
            line += f"; {further:,} records of a further pass complete the last step"
        logger.info("%s: %s", file.source, line)


def token_lengths(store: RecordStore, encoder: Any) -> list[TokenLengths]:
    """Of all queries and documents, or of a sample of them. encoder: the model's `text_encoder`."""
    places, sampled = sampled_pairs(store)
    pairs = [store.pair(int(place)) for place in places]
    texts = {"query": list({pair.query for pair in pairs}), "document": [pair.document for pair in pairs]}
    return [
        TokenLengths(
            kind,
            np.array([len(text) for text in encoder.encode(texts[kind], kind, max_length=NO_LIMIT)]),
            encoder.max_length_of(kind),
            sampled,
        )
        for kind in texts
    ]
