"""The data of an embedder's run: opened, checked, and laid out as steps."""

import logging
from dataclasses import dataclass
from typing import Any

import numpy as np
from accelerate import Accelerator

from rag_retrieval.data.store import RecordStore, open_store
from rag_retrieval.data.summary import TokenLengths
from rag_retrieval.train.embedding.config import EmbeddingConfig
from rag_retrieval.train.embedding.training_data import EmbeddingSteps, SamplingOptions, groups_with_positive
from rag_retrieval.train.run_data import DataSource, distinct_names, sampled_pairs
from rag_retrieval.train.steps import CarriedSteps, StepShape

logger = logging.getLogger(__name__)

UNLIMITED = 1 << 30  # tokens


@dataclass(frozen=True)
class TrainingFile:
    """name: that of the file, "" where it is the only one."""

    source: str
    name: str
    store: RecordStore


def open_training_files(config: EmbeddingConfig) -> list[TrainingFile]:
    """The memory-mapped training data, in the order of the configuration; one process of a machine builds what is
    missing. Data in which no query has a positive are refused."""
    names = distinct_names(config.train_files)
    return [open_training_file(config, source, name) for source, name in zip(config.train_files, names, strict=True)]


def open_training_file(config: EmbeddingConfig, source: str, name: str) -> TrainingFile:
    store = open_store(source, split=config.train_split, group_by_query=True, text_ids=True)
    idle = store.num_groups - len(groups_with_positive(store))
    if idle == store.num_groups:
        raise ValueError(
            f"train_dataset: {source}: no query has a positive document, so {config.loss_type} has nothing to learn; "
            "give each query a document that answers it, in pos or with a label above those of the others"
        )
    if idle:
        counts = f"{idle:,} of {store.num_groups:,} queries"
        logger.warning("%s: %s have no positive document and are left out", source, counts)
    return TrainingFile(source, name, store)


def sources_of(config: EmbeddingConfig, files: list[TrainingFile]) -> list[DataSource]:
    return [DataSource("training", file.source, file.store) for file in files]


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
        options = SamplingOptions(
            config.seed + position, config.train_group_size, config.shuffle, max_tokens, padded
        )
        shape = step_shape(config, file, accelerator.num_processes, accelerator.process_index)
        sets[file.name] = EmbeddingSteps(file.store, file.source, encoder, shape, options, stores, file.name)
    return CarriedSteps(sets, config.epochs)


def step_shape(config: EmbeddingConfig, file: TrainingFile, processes: int, process_index: int) -> StepShape:
    """Of the whole run over a file: full steps alone. What an epoch leaves over begins the next, and the last step is
    completed with records of a further pass."""
    records, accumulation = config.epochs * len(groups_with_positive(file.store)), config.gradient_accumulation_steps
    step = config.batch_size * accumulation * processes
    steps = -(-records // step)
    return StepShape(steps * step, config.batch_size, accumulation, processes, process_index)


def report_steps(files: list[TrainingFile], config: EmbeddingConfig, steps: CarriedSteps) -> None:
    """How files share the steps of the run, and how its last step is completed."""
    for file in files:
        own = steps.sets[file.name]
        count, records = own.steps_per_epoch, own.shape.records
        further = records - config.epochs * len(own.groups)
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
            np.array([len(text) for text in encoder.encode(texts[kind], kind, max_length=UNLIMITED)]),
            encoder.max_length_of(kind),
            sampled,
        )
        for kind in texts
    ]
