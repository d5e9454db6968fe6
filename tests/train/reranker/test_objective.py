"""One loss or a mix: sums with weights, a divisor for each, and what is read for which."""

import math

import numpy as np
import pytest
import torch
from loss_values import reduced

from rag_retrieval import losses
from rag_retrieval.losses import LOSSES
from rag_retrieval.models.token_batch import TokenBatch
from rag_retrieval.train.reranker.config import RerankerConfig
from rag_retrieval.train.reranker.objective import (
    ConstantScoreWatch,
    Objective,
    configured_objective,
    squared_deviations,
)
from rag_retrieval.train.reranker.training_data import RerankerMicroBatch

kl_distillation, listwise_ce, margin_mse, pointwise_bce, ranknet = map(
    reduced, (losses.kl_distillation, losses.listwise_ce, losses.margin_mse, losses.pointwise_bce, losses.ranknet)
)
SCORES = torch.tensor([[1.0, 2.0, -0.5], [0.3, -1.2, 0.0]])
LABELS = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]])
TEACHER = torch.tensor([[7.0, -2.5, 3.0], [5.0, 5.5, 0.0]])
MASK = torch.tensor([[True, True, True], [True, True, False]])
EVERYTHING = (LABELS, TEACHER, MASK)


def objective(loss_type: str, **changes) -> Objective:
    return configured_objective(RerankerConfig(**{
        "model_name_or_path": "owner/model",
        "model_type": "bert_encoder",
        "train_dataset": "train.jsonl",
        "train_dataset_type": LOSSES[loss_type].dataset_type,
        "loss_type": loss_type,
        "output_dir": "out",
    } | changes))  # fmt: skip


@pytest.mark.parametrize("weight", [0.0, 0.25, 1.0])
def test_a_mix_has_a_weighted_sum_and_a_count_for_each_loss(weight):
    mix = objective("pairwise_ranknet", teacher_loss_type="margin_mse", teacher_weight=weight)
    expected = [
        (1 - weight) * ranknet(SCORES, LABELS, MASK, "sum").item(),
        weight * margin_mse(SCORES, TEACHER, MASK, "sum").item(),
    ]
    assert mix.sums(SCORES, *EVERYTHING).tolist() == pytest.approx(expected)
    assert mix.counts(*EVERYTHING) == (3, 4)
    assert mix.needs_teacher and mix.grouped and not mix.one_positive


def test_each_loss_has_its_own_temperature_also_in_its_chance():
    mix = objective("listwise_ce", temperature=0.5, teacher_loss_type="kl_distillation", teacher_temperature=4.0)
    expected = [
        0.5 * listwise_ce(SCORES, LABELS, MASK, "sum", temperature=0.5).item(),
        0.5 * kl_distillation(SCORES, TEACHER, MASK, "sum", temperature=4.0).item(),
    ]
    assert mix.sums(SCORES, *EVERYTHING).tolist() == pytest.approx(expected)
    flat = torch.zeros(2, 3)
    of_teacher = kl_distillation(flat, TEACHER, MASK, temperature=4.0).item()
    of_labels = listwise_ce(flat, LABELS, MASK).item()
    assert mix.constant_score_loss(*EVERYTHING) == pytest.approx(0.5 * of_labels + 0.5 * of_teacher)
    assert objective("kl_distillation", temperature=4.0).constant_score_loss(*EVERYTHING) == pytest.approx(of_teacher)


def test_options_of_the_lambda_loss_reach_it():
    by_default, at_one = objective("lambda_loss"), objective("lambda_loss", lambda_top_k=1)
    plain = objective("lambda_loss", lambda_weights="lambdarank")
    sums = {found.sums(-SCORES, LABELS, None, MASK).item() for found in (by_default, at_one, plain)}
    chances = {found.constant_score_loss(LABELS, None, MASK) for found in (by_default, at_one, plain)}
    assert len(sums) == len(chances) == 3
    assert by_default.sums(SCORES, LABELS, None, MASK)[0] == LOSSES["lambda_loss"](SCORES, LABELS, MASK)[0]


def test_a_pointwise_teacher_loss_reads_probabilities_as_soft_labels():
    mix = objective("point_mse", teacher_loss_type="point_ce", teacher_weight=0.5)
    soft = torch.tensor([0.9, 0.2])
    sums = mix.sums(SCORES[0, :2], LABELS[0, :2], soft, MASK[0, :2])
    assert sums[1].item() == pytest.approx(0.5 * pointwise_bce(SCORES[0, :2], soft, None, "sum").item())
    assert mix.teacher_range == (0, 1)


def test_what_is_read_follows_from_the_losses():
    assert Objective.of(LOSSES["listnet"]).needs_teacher is False
    assert Objective.of(LOSSES["margin_mse"]).needs_teacher is True
    assert [Objective.of(LOSSES[name]).reads_positives for name in ("info_nce", "listwise_ce", "listnet")] == [
        True, True, False
    ]  # fmt: skip
    assert [Objective.of(LOSSES[name]).teacher_range for name in ("point_ce", "kl_distillation")] == [None, None]


def test_the_mean_of_a_mix_is_the_same_however_steps_are_split():
    mix = objective("pairwise_ranknet", teacher_loss_type="kl_distillation")
    parts = [tuple(tensor[row : row + 1] for tensor in (SCORES, *EVERYTHING)) for row in range(2)]
    sums = sum(mix.sums(*part) for part in parts)
    counts = [sum(column) for column in zip(*(mix.counts(*part[1:]) for part in parts), strict=True)]
    mean = sum(total / count for total, count in zip(sums.tolist(), counts, strict=True))
    expected = 0.5 * ranknet(SCORES, LABELS, MASK).item() + 0.5 * kl_distillation(SCORES, TEACHER, MASK).item()
    assert mean == pytest.approx(expected) and math.isfinite(mean)


# The watch for scores that do not vary

NOTHING = np.zeros(0, np.int32)
NO_PAIRS = TokenBatch(NOTHING, None, NOTHING, NOTHING, NOTHING, NOTHING > 0, NOTHING)


def watching(loss_type: str) -> ConstantScoreWatch:
    return ConstantScoreWatch(Objective.of(LOSSES[loss_type]))


def batch(loss_type: str, labels: list, mask: list | None = None) -> RerankerMicroBatch:
    values = torch.tensor(labels, dtype=torch.float32)
    kept = torch.ones_like(values, dtype=torch.bool) if mask is None else torch.tensor(mask)
    items = LOSSES[loss_type].count(values, kept)
    return RerankerMicroBatch(NO_PAIRS, values, kept, (items,), int(kept.sum()), [])


def add(watch: ConstantScoreWatch, scores: list, micro_batch: RerankerMicroBatch) -> None:
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


def flat(watch: ConstantScoreWatch, step: int, total: int) -> None:
    add(watch, [[0.0, 0.01]], batch("listwise_ce", [[1, 0]]))
    watch.report(step, total)


def test_it_warns_once_after_a_fifth_of_the_run(caplog):
    watch = watching("listwise_ce")
    for step in range(1, 100):
        flat(watch, step, 100)
        assert caplog.text.count("same score") == (step >= 20)
    assert "for 20 steps" in caplog.text


def test_a_watch_of_one_of_several_files_names_it(caplog):
    watch = ConstantScoreWatch(Objective.of(LOSSES["listwise_ce"]), "b.jsonl")
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


def test_a_report_below_the_constant_score_loss_restarts_the_count(caplog):
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
