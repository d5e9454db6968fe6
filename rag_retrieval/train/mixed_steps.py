"""Several data sets in one run: they take turns, and each optimizer step is of one of them.

A step thus has one loss, one layout and one divisor, and its micro-batches are cut as if its data set were alone.
What a reader would get wrong: an epoch is not a pass over every set. A set of weight 2 is passed over twice in it, and
one of weight 0.5 goes on in the next epoch where it stopped in this.
"""

from collections.abc import Mapping, Sequence

import numpy as np
from torch.utils.data import Dataset

from rag_retrieval.train.step_data import MicroBatch, StepDataset


def records_per_epoch(records: int, weight: float) -> int:
    """weight x records, rounded to a whole number of at least 1. weight: passes over the set in one epoch, above 0."""
    return max(1, round(weight * records))


def take_turns(steps: Sequence[int]) -> np.ndarray:
    """The set whose turn each step of an epoch is: int [sum of steps], where set i stands steps[i] times.

    Spread evenly: the step k of n of a set is due at (k + 1/2) / n of the epoch; of two that are due at once the one of
    the earlier set comes first.
    """
    due = np.concatenate([(np.arange(count) + 0.5) / count for count in steps])
    owner = np.repeat(np.arange(len(steps)), steps)
    return owner[np.lexsort((owner, due))]


class MixedSteps(Dataset):
    """The steps of a run over one data set or more. sets: by the name that their micro-batches have as `part`."""

    def __init__(self, sets: Mapping[str, StepDataset]):
        self.sets = dict(sets)
        self._turns = take_turns([steps.steps_per_epoch for steps in self.sets.values()])
        self._own_step = np.empty_like(self._turns)
        for place in range(len(self.sets)):
            turns = self._turns == place
            self._own_step[turns] = np.arange(turns.sum())

    @property
    def steps_per_epoch(self) -> int:
        return len(self._turns)

    def __getitem__(self, position: tuple[int, int]) -> list[MicroBatch]:
        epoch, step = position
        steps = list(self.sets.values())[self._turns[step]]
        return steps[epoch, int(self._own_step[step])]

    def filler(self, part: str) -> MicroBatch:
        """A micro-batch of weight zero for a step of that set."""
        return self.sets[part].filler()
