"""Which records a step has, how several data sets share an epoch, and what the loader hands over."""

import errno
import subprocess
import sys
from collections import Counter
from dataclasses import dataclass
from fractions import Fraction
from itertools import product

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from rag_retrieval.train.failures import steps_of
from rag_retrieval.train.steps import (
    CarriedSteps,
    MixedSteps,
    StepSampler,
    StepShape,
    interleave,
    pack,
    records_per_epoch,
    step_loader,
    unpack,
)
from rag_retrieval.train.task import ProcessFailure

GRID = list(product([1, 5, 31, 32, 33, 100], [1, 3, 8], [1, 2, 4], [1, 2, 3]))


def shapes(records: int, batch_size: int, accumulation: int, processes: int) -> list[StepShape]:
    return [StepShape(records, batch_size, accumulation, processes, index) for index in range(processes)]


def test_an_epoch_sees_each_record_once_over_all_processes():
    for records, *way in GRID:
        seen = [
            position
            for shape in shapes(records, *way)
            for step in range(shape.steps_per_epoch)
            for micro_batch in shape.positions(step)
            for position in micro_batch
        ]
        assert sorted(seen) == list(range(records)), way


def test_all_processes_have_as_many_micro_batches_and_none_is_too_large():
    for records, batch_size, accumulation, processes in GRID:
        parts = shapes(records, batch_size, accumulation, processes)
        for step in range(parts[0].steps_per_epoch):
            counts = {len(shape.positions(step)) for shape in parts}
            assert len(counts) == 1 and 1 <= counts.pop() <= accumulation
            assert all(len(batch) <= batch_size for shape in parts for batch in shape.positions(step))


def test_a_step_holds_the_same_records_however_they_are_spread():
    ways = [(1, 32, 1), (2, 16, 1), (1, 8, 4), (4, 2, 4)]
    for step in range(4):  # 100 records: the last step holds 4
        held = []
        for processes, batch_size, accumulation in ways:
            parts = shapes(100, batch_size, accumulation, processes)
            held.append({p for shape in parts for batch in shape.positions(step) for p in batch})
        assert held == [set(range(32 * step, min(32 * step + 32, 100)))] * 4


def test_a_process_without_a_record_still_gets_its_micro_batch():
    first, second = shapes(records=5, batch_size=2, accumulation=1, processes=2)
    assert [list(batch) for batch in first.positions(1)] == [[4]]
    assert [list(batch) for batch in second.positions(1)] == [[]]


def test_the_sampler_goes_on_where_a_run_stood():
    everything = [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert list(StepSampler(3, 2, 0)) == everything
    assert list(StepSampler(3, 2, 4)) == everything[4:] and len(StepSampler(3, 2, 4)) == 2
    assert list(StepSampler(3, 2, 6)) == []


# Several data sets


class NamedSteps:
    def __init__(self, name: str, steps_per_epoch: int):
        self.name, self.steps_per_epoch = name, steps_per_epoch

    def __getitem__(self, position):
        return [(self.name, *position)]

    def filler(self):
        return f"filler of {self.name}"


def test_sets_share_an_epoch_as_evenly_as_they_can():
    for steps, owners in (
        ([3], "aaa"),
        ([2, 2], "abab"),
        ([1, 3], "babb"),  # due at 1/2, and at 1/6, 1/2, 5/6: the earlier set first
        ([4, 2], "abaaba"),  # 1/8 3/8 5/8 7/8 and 1/4 3/4
        ([1, 1, 1], "abc"),
        ([2, 1, 4], "cacbcac"),  # 1/4 3/4, 1/2, and 1/8 3/8 5/8 7/8
    ):
        assert "".join("abc"[place] for place in interleave(steps)) == owners


def test_no_set_is_ever_more_than_a_step_off_its_share():
    for steps in ([100, 7], [13, 29, 3], [1000, 1]):
        owners, total = interleave(steps).tolist(), sum(steps)
        for done in range(total + 1):
            counted = Counter(owners[:done])
            assert all(abs(counted[place] - done * count / total) <= 1.5 for place, count in enumerate(steps))
        assert Counter(owners) == dict(enumerate(steps))


def test_a_weight_is_a_number_of_passes_of_one_record_or_more():
    assert [records_per_epoch(10, weight) for weight in (1, 0.5, 2, 0.25, 2.74, 0.001)] == [10, 5, 20, 2, 27, 1]


def test_every_step_of_every_set_comes_once_an_epoch_and_in_order():
    mixed = MixedSteps({"a": NamedSteps("a", 4), "b": NamedSteps("b", 2)})
    assert mixed.steps_per_epoch == 6
    assert [mixed[3, step] for step in range(6)] == [
        [("a", 3, 0)], [("b", 3, 0)], [("a", 3, 1)], [("a", 3, 2)], [("b", 3, 1)], [("a", 3, 3)],
    ]  # fmt: skip


def test_a_filler_is_of_the_set_that_owns_the_step():
    mixed = MixedSteps({"a": NamedSteps("a", 1), "b": NamedSteps("b", 1)})
    assert mixed.filler("b") == "filler of b"


def test_steps_of_a_run_that_are_carried_over_its_epochs_come_once_and_in_order():
    carried = CarriedSteps({"a": NamedSteps("a", 5), "b": NamedSteps("b", 2)}, epochs=3)
    assert carried.steps_per_epoch == Fraction(7, 3)
    positions = list(StepSampler(carried.steps_per_epoch, epochs=3, done=0))
    assert [(epoch, int(step)) for epoch, step in positions] == [(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1)]
    steps = [carried[position] for position in positions]
    assert [step for ((name, _, step),) in steps if name == "a"] == [0, 1, 2, 3, 4]
    assert [step for ((name, _, step),) in steps if name == "b"] == [0, 1]
    assert list(StepSampler(carried.steps_per_epoch, epochs=3, done=4)) == positions[4:]


# The loader


@dataclass
class Batch:
    ids: torch.Tensor
    source: str


class Echo(Dataset):
    steps_per_epoch = 3

    def __getitem__(self, position):
        return [Batch(torch.tensor(position), str(position))]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_gives_steps_in_order_and_takes_no_global_random_number(num_workers):
    before = torch.get_rng_state()
    steps = list(steps_of(step_loader(Echo(), epochs=2, done=1, num_workers=num_workers)))
    positions = [tuple(batch.ids.tolist()) for (batch,) in steps]
    assert positions == [(0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]
    assert [batch.source for (batch,) in steps] == [str(position) for position in positions]
    assert torch.equal(before, torch.get_rng_state())


def test_a_packed_step_is_the_same_step_in_few_more_bytes():
    tensors = [torch.arange(1000, dtype=torch.int32), torch.zeros(3, 5, dtype=torch.bool), torch.tensor(0.5)]
    packed = pack([Batch(tensor, "a") for tensor in tensors])
    again = [batch.ids for batch in unpack(packed, pin_memory=False)]
    assert all(torch.equal(*pair) and pair[0].dtype == pair[1].dtype for pair in zip(tensors, again, strict=True))
    assert 4000 < len(packed) < 5500


WITHOUT_SHARED_MEMORY = """
import resource
import torch
from torch.utils.data import Dataset
from rag_retrieval.train.failures import steps_of
from rag_retrieval.train.steps import step_loader

class Large(Dataset):
    steps_per_epoch = 3
    def __getitem__(self, position):
        return [torch.full((1 << 20,), position[1])]

if __name__ == "__main__":
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))  # no file of 8 MB, in shared memory neither
    print([int(step[0][-1]) for step in steps_of(step_loader(Large(), epochs=1, done=0, num_workers=2))])
"""


def test_steps_larger_than_the_shared_memory_arrive(tmp_path):
    (tmp_path / "load.py").write_text(WITHOUT_SHARED_MEMORY)
    done = subprocess.run([sys.executable, tmp_path / "load.py"], capture_output=True, text=True, timeout=600)
    assert done.stdout == "[0, 1, 2]\n", done.stderr


def test_missing_shared_memory_is_an_error_that_names_the_key_to_change(monkeypatch):
    def refuse(loader):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(DataLoader, "__iter__", refuse)
    with pytest.raises(ProcessFailure, match=r"(?s)/dev/shm.*num_workers: 0"):
        next(steps_of(step_loader(Echo(), epochs=1, done=0, num_workers=2)))
