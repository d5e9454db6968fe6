"""The data of a run: opened, checked, and summarised in the log.

A training file has an objective of its own; that of the run is for validation.
"""

import logging
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rag_retrieval.data.store import RecordStore, open_store
from rag_retrieval.data.summary import format_summary, summary
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.train.card import DataPart
from rag_retrieval.train.reranker.config import RerankerConfig
from rag_retrieval.train.reranker.objective import Objective, WeightedLoss, configured_objective
from rag_retrieval.train.reranker.training_data import records_of
from rag_retrieval.train.steps import MixedSteps, records_per_epoch

logger = logging.getLogger(__name__)

# The summary's token lengths are of so many pairs at most, and of fewer where these have more text than one core
# tokenizes in about a second: 10,000 pairs of 500 characters each took 4 of the 10 seconds before the first step.
LENGTH_SAMPLE, LEAST_SAMPLE = 10_000, 1_000  # pairs
SAMPLE_BYTES = 2_000_000


@dataclass(frozen=True)
class TrainingFile:
    """One file of the training data. config: of a run on it alone. weight: passes over it in one epoch, above 0. name:
    that of the file, "" where it is the only one."""

    config: RerankerConfig
    weight: float
    name: str
    objective: Objective
    store: RecordStore

    @property
    def records(self) -> int:
        return records_of(self.store, self.objective)

    @property
    def records_per_epoch(self) -> int:
        return records_per_epoch(self.records, self.weight)


def open_training_files(config: RerankerConfig) -> list[TrainingFile]:
    """The memory-mapped training data, in the order of the configuration; one process of a machine builds what is
    missing. Data that can teach their loss nothing are refused."""
    paths = [alone.train_dataset for alone, _ in config.files]
    names = distinct_names(paths) if len(paths) > 1 else [""]
    files = [open_training_file(*file, name) for file, name in zip(config.files, names, strict=True)]
    for file in files:
        check_teachable(file)
    return files


def distinct_names(paths: list[str]) -> list[str]:
    """The last part of each path; where several have the same, with its number in the list, from 1, before it."""
    names = [Path(path).name for path in paths]
    return [name if names.count(name) == 1 else f"{number}-{name}" for number, name in enumerate(names, 1)]


def open_training_file(config: RerankerConfig, weight: float, name: str) -> TrainingFile:
    objective = configured_objective(config)
    store = open_store(
        config.train_dataset,
        split=config.train_split or "train",
        label_key=config.train_label_key,
        group_by_query=True,  # pointwise steps keep the pairs of a query together too
        exactly_one_positive=objective.one_positive,
        needs_teacher=objective.needs_teacher,
        **shared_rules(config, objective),
    )
    return TrainingFile(config, weight, name, objective, store)


def open_validation(config: RerankerConfig) -> RecordStore | None:
    if config.val_dataset is None:
        return None
    return open_store(
        config.val_dataset,
        split=config.val_split or "validation",
        label_key=config.val_label_key,
        group_by_query=True,  # ranking metrics need the pairs of a query together
        **shared_rules(config, configured_objective(config)),
    )


def shared_rules(config: RerankerConfig, objective: Objective) -> dict:
    """What training and validation data must both satisfy, as arguments of `open_store`."""
    return {
        "min_label": config.min_label,
        "max_label": config.max_label,
        "teacher_key": config.teacher_score_key,
        "teacher_range": objective.teacher_range,
    }


def check_teachable(file: TrainingFile) -> None:
    """Groups in which all labels are equal (one document, too) teach a loss on labels nothing, and groups of one
    document no grouped loss anything: they are reported, and data that hold nothing else are refused."""
    for weighted in file.objective.losses if file.objective.grouped else ():
        if not weighted.from_deepest:
            check_groups(file, weighted)


def check_groups(file: TrainingFile, weighted: WeightedLoss) -> None:
    groups, name, source = file.store.num_groups, weighted.loss.name, file.config.train_dataset
    if weighted.from_teacher:
        count, fault, remedy = int((file.store.group_sizes == 1).sum()), "one document alone", "several documents"
    else:
        count, fault = summary(file.store).equal_label_groups, "documents of one label only"
        remedy = "documents of different labels"
    idle = f"{count:,} of {groups:,} groups have {fault}"
    if count == groups:
        raise ValueError(
            f"train_dataset: {source}: {idle}, so {name} has nothing to learn; give each "
            f"query {remedy}, or use a pointwise loss"
        )
    if count:
        logger.warning("%s: %s: they teach %s nothing", source, idle, name)


def sources(
    config: RerankerConfig, files: list[TrainingFile], validation: RecordStore | None
) -> list[tuple[str, str, RecordStore]]:
    """What each file is for, its name and its records."""
    training = [("training", file.config.train_dataset, file.store) for file in files]
    return training if validation is None else [*training, ("validation", config.val_dataset, validation)]


def data_parts(config: RerankerConfig, files: list[TrainingFile], validation: RecordStore | None) -> list[DataPart]:
    return [DataPart(purpose, name, summary(store)) for purpose, name, store in sources(config, files, validation)]


def report_data(
    config: RerankerConfig, files: list[TrainingFile], validation: RecordStore | None, scorer: PairScorer
) -> None:
    for name, source, store in sources(config, files, validation):
        lengths, sampled = token_lengths(store, scorer)
        title = f"{name} data: {source}"
        text = format_summary(summary(store), title, token_lengths=lengths, max_len=config.max_len, sampled=sampled)
        logger.info("%s", text)


def report_mix(files: list[TrainingFile], steps: MixedSteps) -> None:
    """How several files share the steps of an epoch."""
    lines = [
        f"  {steps.sets[file.name].steps_per_epoch:,} steps of {file.name}, {file.objective.losses[0].loss.name}: "
        f"{file.records_per_epoch:,} records, of {file.records:,}, weight {file.weight:g}"
        for file in files
    ]
    if len(files) > 1:
        logger.info("an epoch has %s steps:\n%s", f"{steps.steps_per_epoch:,}", "\n".join(lines))


def token_lengths(store: RecordStore, scorer: PairScorer) -> tuple[np.ndarray, bool]:
    """Lengths in tokens, before truncation, of all pairs or of an evenly spread sample of them."""
    size = sum(store.meta["bytes"][name] for name in ("document", "document.offsets"))
    count = sample_size(store.num_pairs, size)
    places = np.linspace(0, store.num_pairs - 1, count).astype(int)
    pairs = [store.pair(int(place)) for place in places]
    lengths = scorer.pair_encoder.untruncated_lengths([(pair.query, pair.document) for pair in pairs])
    return lengths, count < store.num_pairs


def sample_size(pairs: int, size: int) -> int:
    """How many of `pairs` pairs, whose documents take `size` bytes, the token lengths are counted of."""
    affordable = pairs * SAMPLE_BYTES // size
    return min(pairs, LENGTH_SAMPLE, max(affordable, LEAST_SAMPLE))
