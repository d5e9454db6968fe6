"""How the data of a run is cut: the optimizer step is the unit, micro-batches are planned inside it.

A step owns `batch_size * accumulation * processes` records, the same ones however they are spread. What a
reader would get wrong: the last step of an epoch is smaller, and a process may then have nothing to do in a
micro-batch in which others have; it runs a filler of weight zero, because all must meet in the gradient
exchange.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from rag_retrieval.core.signals import ignore_stop_in_worker
from rag_retrieval.train.optim import optimizer_steps_per_epoch


class MicroBatch(Protocol):
    """One forward and backward. `items` is its part of each loss's divisor, `size` what throughput counts. `part` names
    the data set it is of, "" where a run has but one; all micro-batches of a step are of the same."""

    items: tuple[int, ...]
    size: int
    sources: list[str]
    part: str

    def to(self, device: torch.device) -> "MicroBatch": ...

    def pin_memory(self) -> "MicroBatch": ...


class StepDataset(Protocol):
    """One data set, indexed by (epoch, step in epoch): this process's micro-batches of that step."""

    steps_per_epoch: int

    def __getitem__(self, position: tuple[int, int]) -> list[MicroBatch]: ...

    def filler(self) -> MicroBatch:
        """A micro-batch of weight zero."""


@dataclass(frozen=True)
class StepShape:
    """How records are spread over processes and micro-batches. All counts are at least 1."""

    records: int
    batch_size: int
    accumulation: int
    processes: int = 1
    process_index: int = 0

    @property
    def steps_per_epoch(self) -> int:
        return optimizer_steps_per_epoch(self.records, self.batch_size, self.accumulation, self.processes)

    def positions(self, step: int) -> list[range]:
        """This process's positions in the epoch's order for one step, one range for each micro-batch.

        Positions of a step are dealt to the processes in turn. Every process gets the same number of
        micro-batches; some may be empty in the last step.
        """
        step_size = self.batch_size * self.accumulation * self.processes
        start, stop = step * step_size, min((step + 1) * step_size, self.records)
        mine = range(start + self.process_index, stop, self.processes)
        largest_share = -(-(stop - start) // self.processes)
        return [mine[first : first + self.batch_size] for first in range(0, largest_share, self.batch_size)]


class StepSampler(Sampler):
    """(epoch, step in epoch) of every step that is still to do, after `done` optimizer steps."""

    def __init__(self, steps_per_epoch: int, epochs: int, done: int):
        self.steps_per_epoch, self.total, self.done = steps_per_epoch, steps_per_epoch * epochs, done

    def __len__(self) -> int:
        return self.total - self.done

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (divmod(step, self.steps_per_epoch) for step in range(self.done, self.total))


def step_loader(
    dataset: Dataset, epochs: int, done: int, num_workers: int, pin_memory: bool
) -> DataLoader:
    """Steps in order, prepared ahead by workers. The loader takes no random number from the global generator:
    a resumed run would otherwise see other dropout masks. dataset: indexed as a `StepDataset`."""
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=StepSampler(dataset.steps_per_epoch, epochs, done),
        num_workers=num_workers,
        collate_fn=_as_it_is,
        pin_memory=pin_memory,
        generator=torch.Generator(),
        prefetch_factor=4 if num_workers else None,
        worker_init_fn=ignore_stop_in_worker,
    )


def _as_it_is(micro_batches: list[MicroBatch]) -> list[MicroBatch]:
    return micro_batches
