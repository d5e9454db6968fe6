"""What every trainer says of its data: names of the files, how long texts are, and how files share an epoch."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from rag_retrieval.data.store import RecordStore
from rag_retrieval.data.summary import TokenLengths, format_summary, summary
from rag_retrieval.train.card import DataPart
from rag_retrieval.train.steps import MixedSteps

logger = logging.getLogger(__name__)

# The summary's token lengths are of so many pairs at most, and of fewer where these have more text than one core
# tokenizes in about a second: 10,000 pairs of 500 characters each took 4 of the 10 seconds before the first step.
LENGTH_SAMPLE, LEAST_SAMPLE = 10_000, 1_000  # pairs
SAMPLE_BYTES = 2_000_000


class DataSource(NamedTuple):
    """purpose: "training" or "validation". source: a path or the name of a hub data set. files: its content. store:
    None for a collection, which is no store."""

    purpose: str
    source: str
    files: Sequence[Path]
    store: RecordStore | None


class DataFile(Protocol):
    """A training file. name: "" where it is the only one. weight: passes over it in one epoch."""

    name: str
    records: int
    records_per_epoch: int
    weight: float
    loss_name: str


def distinct_names(paths: Sequence[str]) -> list[str]:
    """The last part of each path, "" for one alone; where several have the same, with its number in the list, from 1,
    before it."""
    names = [Path(path).name for path in paths] if len(paths) > 1 else [""]
    return [name if names.count(name) == 1 else f"{number}-{name}" for number, name in enumerate(names, 1)]


def data_parts(sources: Sequence[DataSource]) -> list[DataPart]:
    return [DataPart(purpose, source, summary(store)) for purpose, source, _, store in sources if store is not None]


def report_data(sources: Sequence[DataSource], lengths_of: Callable[[RecordStore], list[TokenLengths]]) -> None:
    for purpose, source, _, store in sources:
        if store is not None:
            logger.info("%s", format_summary(summary(store), f"{purpose} data: {source}", lengths_of(store)))


def report_mix(files: Sequence[DataFile], steps: MixedSteps) -> None:
    """How several files share the steps of an epoch."""
    lines = [
        f"  {steps.sets[file.name].steps_per_epoch:,} steps of {file.name}, {file.loss_name}: "
        f"{file.records_per_epoch:,} records, of {file.records:,}, weight {file.weight:g}"
        for file in files
    ]
    if len(files) > 1:
        logger.info("an epoch has %s steps:\n%s", f"{steps.steps_per_epoch:,}", "\n".join(lines))


def sampled_pairs(store: RecordStore) -> tuple[np.ndarray, bool]:
    """Numbers of all pairs, or of an evenly spread sample of them, whose texts are a moment's work; and whether it is a
    sample."""
    size = sum(store.meta["bytes"][name] for name in ("document", "document.offsets"))
    count = sample_size(store.num_pairs, size)
    return np.linspace(0, store.num_pairs - 1, count).astype(int), count < store.num_pairs


def sample_size(pairs: int, size: int) -> int:
    """How many of `pairs` pairs, whose documents take `size` bytes, the token lengths are counted of."""
    affordable = pairs * SAMPLE_BYTES // size
    return min(pairs, LENGTH_SAMPLE, max(affordable, LEAST_SAMPLE))
