"""The data of a run: opened and checked.

A training file has an objective of its own; that of the run is for validation.
"""

import logging
from dataclasses import dataclass, replace

from rag_retrieval.data.records import RecordRules
from rag_retrieval.data.store import RecordStore, open_store
from rag_retrieval.data.summary import summary
from rag_retrieval.train.reranker.config import RerankerConfig
from rag_retrieval.train.reranker.objective import Objective, WeightedLoss, configured_objective
from rag_retrieval.train.reranker.training_data import records_of
from rag_retrieval.train.run_data import distinct_names
from rag_retrieval.train.steps import records_per_epoch

logger = logging.getLogger(__name__)


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

    @property
    def loss_name(self) -> str:
        return self.objective.losses[0].loss.name


def open_training_files(config: RerankerConfig) -> list[TrainingFile]:
    """The memory-mapped training data, in the order of the configuration; one process of a machine builds what is
    missing. Data that can teach their loss nothing are refused."""
    paths = [alone.train_dataset for alone, _ in config.files]
    names = distinct_names(paths)
    files = [open_training_file(*file, name) for file, name in zip(config.files, names, strict=True)]
    for file in files:
        check_teachable(file)
    return files


def open_training_file(config: RerankerConfig, weight: float, name: str) -> TrainingFile:
    objective = configured_objective(config)
    rules = replace(
        validation_rules(config, objective),
        label_key=config.train_label_key,
        exactly_one_positive=objective.one_positive,
        needs_teacher=objective.needs_teacher,
    )
    # pointwise steps keep the pairs of a query together too
    store = open_store(config.train_dataset, rules, split=config.train_split or "train", group_by_query=True)
    return TrainingFile(config, weight, name, objective, store)


def open_validation(config: RerankerConfig) -> RecordStore | None:
    if config.val_dataset is None:
        return None
    rules = validation_rules(config, configured_objective(config))
    # ranking metrics need the pairs of a query together
    return open_store(config.val_dataset, rules, split=config.val_split or "validation", group_by_query=True)


def validation_rules(config: RerankerConfig, objective: Objective) -> RecordRules:
    return RecordRules(
        config.val_label_key or "label",
        config.min_label,
        config.max_label,
        teacher_key=config.teacher_score_key,
        teacher_range=objective.teacher_range,
    )


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
