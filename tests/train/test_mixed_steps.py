from collections import Counter

import pytest

from rag_retrieval.train.mixed_steps import MixedSteps, records_per_epoch, take_turns


class NamedSteps:
    def __init__(self, name: str, steps_per_epoch: int):
        self.name, self.steps_per_epoch = name, steps_per_epoch

    def __getitem__(self, position):
        return [(self.name, *position)]

    def filler(self):
        return f"filler of {self.name}"


@pytest.mark.parametrize(
    ("steps", "turns"),
    [
        ([3], "aaa"),
        ([2, 2], "abab"),
        ([1, 3], "babb"),  # due at 1/2, and at 1/6, 1/2, 5/6: the earlier set first
        ([4, 2], "abaaba"),  # 1/8 3/8 5/8 7/8 and 1/4 3/4
        ([1, 1, 1], "abc"),
        ([2, 1, 4], "cacbcac"),  # 1/4 3/4, 1/2, and 1/8 3/8 5/8 7/8
    ],
)
def test_sets_take_turns_as_evenly_as_they_can(steps, turns):
    assert "".join("abc"[place] for place in take_turns(steps)) == turns


@pytest.mark.parametrize("steps", [[100, 7], [13, 29, 3], [1000, 1]])
def test_no_set_is_ever_more_than_a_step_off_its_share(steps):
    turns, total = take_turns(steps).tolist(), sum(steps)
    for done in range(total + 1):
        found = Counter(turns[:done])
        assert all(abs(found[place] - done * count / total) <= 1.5 for place, count in enumerate(steps))
    assert Counter(turns) == dict(enumerate(steps))


def test_a_weight_is_the_number_of_passes_and_shows_at_least_one_record():
    assert [records_per_epoch(10, weight) for weight in (1, 0.5, 2, 0.25, 2.74, 0.001)] == [10, 5, 20, 2, 27, 1]


def test_every_step_of_every_set_comes_once_an_epoch_and_in_order():
    mixed = MixedSteps({"a": NamedSteps("a", 4), "b": NamedSteps("b", 2)})
    assert mixed.steps_per_epoch == 6
    assert [mixed[3, step] for step in range(6)] == [
        [("a", 3, 0)], [("b", 3, 0)], [("a", 3, 1)], [("a", 3, 2)], [("b", 3, 1)], [("a", 3, 3)],
    ]  # fmt: skip


def test_a_filler_is_of_the_set_whose_turn_it_is():
    mixed = MixedSteps({"a": NamedSteps("a", 1), "b": NamedSteps("b", 1)})
    assert mixed.filler("b") == "filler of b"
