"""One loss or a mix: sums with weights, a divisor for each, and what is read for which."""

import math

import pytest
import torch
from loss_values import reduced

from rag_retrieval import losses
from rag_retrieval.losses import LOSSES
from rag_retrieval.train.reranker.config import RerankerConfig
from rag_retrieval.train.reranker.objective import Objective, configured_objective

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
    assert mix.chance(*EVERYTHING) == pytest.approx(0.5 * listwise_ce(flat, LABELS, MASK).item() + 0.5 * of_teacher)
    assert objective("kl_distillation", temperature=4.0).chance(*EVERYTHING) == pytest.approx(of_teacher)


def test_options_of_the_lambda_loss_reach_it():
    by_default, at_one = objective("lambda_loss"), objective("lambda_loss", lambda_top_k=1)
    plain = objective("lambda_loss", lambda_weights="lambdarank")
    sums = {found.sums(-SCORES, LABELS, None, MASK).item() for found in (by_default, at_one, plain)}
    chances = {found.chance(LABELS, None, MASK) for found in (by_default, at_one, plain)}
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


def test_the_mean_of_a_mix_does_not_depend_on_how_a_step_is_cut():
    mix = objective("pairwise_ranknet", teacher_loss_type="kl_distillation")
    parts = [tuple(tensor[row : row + 1] for tensor in (SCORES, *EVERYTHING)) for row in range(2)]
    sums = sum(mix.sums(*part) for part in parts)
    counts = [sum(column) for column in zip(*(mix.counts(*part[1:]) for part in parts), strict=True)]
    mean = sum(total / count for total, count in zip(sums.tolist(), counts, strict=True))
    expected = 0.5 * ranknet(SCORES, LABELS, MASK).item() + 0.5 * kl_distillation(SCORES, TEACHER, MASK).item()
    assert mean == pytest.approx(expected) and math.isfinite(mean)
