"""The steps of a run: which records belong to an optimizer step, and the loader that prepares steps ahead.

A step has `batch_size * accumulation * processes` records, the same ones however they are spread. The last step of an
epoch has what is left, and a process without a record in it runs a filler of weight zero, because all processes must
meet in the gradient exchange. Of several data sets each step has one, so that it has one loss, one layout and one
divisor.
"""

import io
import pickle
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from rag_retrieval.core.signals import ignore_stop_in_worker


class MicroBatch(Protocol):
    """One forward and backward. `items` is its part of each loss's divisor, `size` what throughput counts. `part` names
    its data set, "" where a run has one alone; all micro-batches of a step are of the same."""

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
    def step_size(self) -> int:
        """Records of a full step."""
        return self.batch_size * self.accumulation * self.processes

    @property
    def steps_per_epoch(self) -> int:
        """The last and perhaps smaller step included."""
        return -(-self.records // self.step_size)

    def positions(self, step: int) -> list[range]:
        """This process's positions in the epoch's order for one step, one range for each micro-batch.

        Positions of a step are dealt to the processes in turn. Every process gets the same number of
        micro-batches; some may be empty in the last step.
        """
        start, stop = step * self.step_size, min((step + 1) * self.step_size, self.records)
        mine = range(start + self.process_index, stop, self.processes)
        largest_share = -(-(stop - start) // self.processes)
        return [mine[first : first + self.batch_size] for first in range(0, largest_share, self.batch_size)]


def records_per_epoch(records: int, weight: float) -> int:
    """weight x records, rounded to a whole number of at least 1. weight: passes over the set in one epoch, above 0."""
    return max(1, round(weight * records))


def interleave(steps: Sequence[int]) -> np.ndarray:
    """The set of each step of an epoch: int [sum of steps], where set i stands steps[i] times, spread evenly.

    Step k of n of a set is due at (k + 1/2) / n of the epoch; of two that are due at once the earlier set comes first.
    """
    due = np.concatenate([(np.arange(count) + 0.5) / count for count in steps])
    owner = np.repeat(np.arange(len(steps)), steps)
    return owner[np.lexsort((owner, due))]


class MixedSteps(Dataset):
    """The steps of a run over one data set or more. sets: by the name that their micro-batches have as `part`.

    An epoch is not a pass over every set: one of weight 2 is passed over twice, one of weight 0.5 continues in the
    next epoch where it stopped.
    """

    def __init__(self, sets: Mapping[str, StepDataset]):
        self.sets = dict(sets)
        self._owners = interleave([steps.steps_per_epoch for steps in self.sets.values()])
        self._own_step = np.empty_like(self._owners)
        for place in range(len(self.sets)):
            owned = self._owners == place
            self._own_step[owned] = np.arange(owned.sum())

    @property
    def steps_per_epoch(self) -> int:
        return len(self._owners)

    def __getitem__(self, position: tuple[int, int]) -> list[MicroBatch]:
        epoch, step = position
        steps = list(self.sets.values())[self._owners[step]]
        return steps[epoch, int(self._own_step[step])]

    def filler(self, part: str) -> MicroBatch:
        """A micro-batch of weight zero for a step of that set."""
        return self.sets[part].filler()


class CarriedSteps(MixedSteps):
    """Steps that are cut over the whole run, for a loss that depends on the number of records in a step: what an epoch
    leaves over begins the next one, and all steps are full.

    sets: as of `MixedSteps`, but with the steps of the whole run as their one epoch. epochs: of the run.
    """

    def __init__(self, sets: Mapping[str, StepDataset], epochs: int):
        super().__init__(sets)
        self.epochs = epochs

    @property
    def steps_per_epoch(self) -> Fraction:
        return Fraction(len(self._owners), self.epochs)

    def __getitem__(self, position: tuple[int, Fraction]) -> list[MicroBatch]:
        epoch, step = position
        return super().__getitem__((0, int(epoch * self.steps_per_epoch + step)))


class StepSampler(Sampler):
    """(epoch, step in epoch) of every step that is still to do, after `done` optimizer steps."""

    def __init__(self, steps_per_epoch: int | Fraction, epochs: int, done: int):
        self.steps_per_epoch, self.total, self.done = steps_per_epoch, int(steps_per_epoch * epochs), done

    def __len__(self) -> int:
        return self.total - self.done

    def __iter__(self) -> Iterator[tuple[int, int]]:
        return (divmod(step, self.steps_per_epoch) for step in range(self.done, self.total))


def step_loader(dataset: Dataset, epochs: int, done: int, num_workers: int) -> DataLoader:
    """Steps in order, prepared ahead by workers, at most two for each; `unpack` makes micro-batches of what it yields.

    dataset: indexed as a `StepDataset`. The loader takes no random number from the global generator: a resumed run
    would otherwise see other dropout masks.
    """
    return DataLoader(
        dataset,
        batch_size=None,
        sampler=StepSampler(dataset.steps_per_epoch, epochs, done),
        num_workers=num_workers,
        collate_fn=pack if num_workers else list,
        generator=torch.Generator(),
        prefetch_factor=2 if num_workers else None,
        worker_init_fn=ignore_stop_in_worker,
    )


class _Pickler(pickle.Pickler):
    def reducer_override(self, value: Any) -> Any:
        """Tensors as arrays: torch's own way wraps each in a file format."""
        return (torch.from_numpy, (value.numpy(),)) if isinstance(value, torch.Tensor) else NotImplemented


def pack(micro_batches: list[MicroBatch]) -> bytes:
    """A step as bytes, which go through a pipe. Left as tensors, it would go through shared memory, and where that is
    full (64 MB in a container) torch's workers drop the step and the training process waits for good."""
    buffer = io.BytesIO()
    _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(micro_batches)
    return buffer.getvalue()


def unpack(step: bytes | list[MicroBatch], pin_memory: bool) -> list[MicroBatch]:
    micro_batches = pickle.loads(step) if isinstance(step, bytes) else step
    return [batch.pin_memory() for batch in micro_batches] if pin_memory else micro_batches
