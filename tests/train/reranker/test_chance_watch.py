import math

import numpy as np
import pytest
import torch

from rag_retrieval.losses import LOSSES
from rag_retrieval.models.token_batch import TokenBatch
from rag_retrieval.train.reranker.chance_watch import ChanceWatch, squared_deviations
from rag_retrieval.train.reranker.objective import Objective
from rag_retrieval.train.reranker.training_data import RerankerMicroBatch

NOTHING = np.zeros(0, np.int32)
NO_PAIRS = TokenBatch(NOTHING, None, NOTHING, NOTHING)


def watching(loss_type: str) -> ChanceWatch:
    return ChanceWatch(Objective.of(LOSSES[loss_type]))


def batch(loss_type: str, labels: list, mask: list | None = None) -> RerankerMicroBatch:
    values = torch.tensor(labels, dtype=torch.float32)
    kept = torch.ones_like(values, dtype=torch.bool) if mask is None else torch.tensor(mask)
    items = LOSSES[loss_type].count(values, kept)
    return RerankerMicroBatch(NO_PAIRS, values, kept, (items,), int(kept.sum()), [])


def add(watch: ChanceWatch, scores: list, micro_batch: RerankerMicroBatch) -> None:
    values = torch.tensor(scores, dtype=torch.float32)
    sums = watch.objective.sums(values, micro_batch.labels, micro_batch.teacher_scores, micro_batch.mask)
    watch.add(sums, values, micro_batch)


def test_pointwise_chance_is_the_entropy_of_the_labels():
    watch = watching("point_ce")
    add(watch, [0.0, 0.0], batch("point_ce", [1, 0]))
    add(watch, [2.0, 4.0], batch("point_ce", [0, 0]))
    reported = watch.report(1, 10)
    assert reported["chance_loss"] == pytest.approx(-(0.25 * math.log(0.25) + 0.75 * math.log(0.75)))
    assert reported["score_std"] == pytest.approx(math.sqrt((0 + 0 + 1 + 1) / 4))


def test_grouped_spread_is_within_groups_and_without_padding():
    watch = watching("listwise_ce")
    add(watch, [[5.0, 7.0], [100.0, 100.0]], batch("listwise_ce", [[1, 0], [1, 0]]))
    add(watch, [[1.0, 1.0, 4.0]], batch("listwise_ce", [[1, 0, 0]], mask=[[True, True, False]]))
    reported = watch.report(1, 10)
    assert reported["chance_loss"] == pytest.approx(math.log(2))
    assert reported["score_std"] == pytest.approx(math.sqrt(2 / 6))


def test_padding_takes_no_part_in_the_deviations():
    scores, mask = torch.tensor([[1.0, 3.0, 9.0]]), torch.tensor([[True, True, False]])
    assert squared_deviations(scores, mask).item() == 2.0


def test_fillers_count_nothing_and_a_report_without_items_is_empty():
    watch = watching("listwise_ce")
    add(watch, [[9.0]], batch("listwise_ce", [[0]], mask=[[False]]))
    assert watch.report(1, 10) == {}
    add(watch, [[0.0, 0.0]], batch("listwise_ce", [[0, 0]]))  # a group without a positive
    assert watch.report(2, 10) == {}


def flat(watch: ChanceWatch, step: int, total: int) -> None:
    add(watch, [[0.0, 0.01]], batch("listwise_ce", [[1, 0]]))
    watch.report(step, total)


def test_it_warns_once_after_a_fifth_of_the_run(caplog):
    watch = watching("listwise_ce")
    for step in range(1, 100):
        flat(watch, step, 100)
        assert caplog.text.count("same score") == (step >= 20)
    assert "for 20 steps" in caplog.text


def test_a_watch_of_one_of_several_files_names_it(caplog):
    watch = ChanceWatch(Objective.of(LOSSES["listwise_ce"]), "b.jsonl")
    add(watch, [[0.0, 0.0]], batch("listwise_ce", [[1, 0]]))
    assert watch.report(1, 100) == {"chance_loss/b.jsonl": pytest.approx(math.log(2)), "score_std/b.jsonl": 0.0}
    for step in range(2, 30):
        flat(watch, step, 100)
    assert "the loss of b.jsonl has stayed" in caplog.text


def test_it_takes_three_reports_and_in_long_runs_no_fifth(caplog):
    watch = watching("listwise_ce")
    flat(watch, 50, 100), flat(watch, 60, 100)
    assert not caplog.text
    long = watching("listwise_ce")
    for step in range(100, 1001, 100):
        assert not caplog.text
        flat(long, step, 1_000_000)
    assert "for 1000 steps" in caplog.text


def test_a_report_above_chance_starts_the_count_anew(caplog):
    watch = watching("listwise_ce")
    for step in range(1, 40):
        if step == 15:
            add(watch, [[2.0, -2.0]], batch("listwise_ce", [[1, 0]]))
            watch.report(step, 100)
        else:
            flat(watch, step, 100)
        assert ("same score" in caplog.text) == (step >= 35)


def test_scores_that_vary_without_being_right_are_not_flat(caplog):
    watch = watching("listwise_ce")
    for step in range(1, 100):
        add(watch, [[0.0, 2.0], [2.0, 0.0]], batch("listwise_ce", [[1, 0], [1, 0]]))
        watch.report(step, 100)
    assert not caplog.text
