from itertools import product

import pytest
import torch
from torch.utils.data import Dataset

from rag_retrieval.train.step_data import StepSampler, StepShape, step_loader

GRID = list(product([1, 5, 31, 32, 33, 100], [1, 3, 8], [1, 2, 4], [1, 2, 3]))


def shapes(records: int, batch_size: int, accumulation: int, processes: int) -> list[StepShape]:
    return [StepShape(records, batch_size, accumulation, processes, index) for index in range(processes)]


@pytest.mark.parametrize(("records", "batch_size", "accumulation", "processes"), GRID)
def test_an_epoch_sees_each_record_once_over_all_processes(records, batch_size, accumulation, processes):
    seen = [
        position
        for shape in shapes(records, batch_size, accumulation, processes)
        for step in range(shape.steps_per_epoch)
        for micro_batch in shape.positions(step)
        for position in micro_batch
    ]
    assert sorted(seen) == list(range(records))


@pytest.mark.parametrize(("records", "batch_size", "accumulation", "processes"), GRID)
def test_all_processes_have_as_many_micro_batches_and_none_is_too_large(
    records, batch_size, accumulation, processes
):
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


class Echo(Dataset):
    steps_per_epoch = 3

    def __getitem__(self, position):
        return [position]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_the_loader_gives_steps_in_order_and_takes_no_global_random_number(num_workers):
    before = torch.get_rng_state()
    steps = list(step_loader(Echo(), epochs=2, done=1, num_workers=num_workers, pin_memory=False))
    assert steps == [[(0, 1)], [(0, 2)], [(1, 0)], [(1, 1)], [(1, 2)]]
    assert torch.equal(before, torch.get_rng_state())
