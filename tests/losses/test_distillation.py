"""MarginMSE and KL distillation against hand values and plain Python."""

import math
from dataclasses import replace

import pytest
import torch
from loss_values import reduced

from rag_retrieval import losses
from rag_retrieval.losses import LOSSES

kl_distillation, margin_mse = reduced(losses.kl_distillation), reduced(losses.margin_mse)
constant_margin_mse = LOSSES["margin_mse"].constant_score_loss
count_document_pairs = LOSSES["margin_mse"].count
count_groups_of_several = LOSSES["kl_distillation"].count

SCORES = torch.tensor([[1.0, 2.0, -0.5], [0.3, -1.2, 50.0], [4.0, 50.0, 50.0], [1.0, 2.0, 3.0]])
TEACHER = torch.tensor([[7.0, -2.5, 3.0], [5.0, 5.0, 9.0], [8.0, 9.0, 9.0], [1.0, 0.0, 0.0]])
MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False], [False, False, False]])
ROWS = [([1.0, 2.0, -0.5], [7.0, -2.5, 3.0]), ([0.3, -1.2], [5.0, 5.0]), ([4.0], [8.0])]


def slow_margins(scores: list[float], teacher: list[float]) -> list[float]:
    places = range(len(scores))
    return [((scores[i] - scores[j]) - (teacher[i] - teacher[j])) ** 2 for i in places for j in places if i < j]


def softmax(values: list[float], temperature: float) -> list[float]:
    weights = [math.exp(value / temperature) for value in values]
    return [weight / sum(weights) for weight in weights]


def slow_divergence(scores: list[float], teacher: list[float], temperature: float) -> float:
    student, target = softmax(scores, temperature), softmax(teacher, temperature)
    return temperature**2 * sum(t * math.log(t / s) for t, s in zip(target, student, strict=True))


def test_margin_mse_is_the_mean_over_all_pairs_of_documents():
    errors = [error for row in ROWS for error in slow_margins(*row)]
    assert len(errors) == count_document_pairs(TEACHER, MASK) == 4
    assert margin_mse(SCORES, TEACHER, MASK).item() == pytest.approx(sum(errors) / 4, rel=1e-6)
    assert margin_mse(SCORES, TEACHER, MASK, "sum").item() == pytest.approx(sum(errors), rel=1e-6)


def test_margin_mse_of_two_documents_by_hand():
    scores = torch.tensor([[1.0, 0.5]], requires_grad=True)
    loss = margin_mse(scores, torch.tensor([[6.0, 2.5]]))
    loss.backward()
    assert loss.item() == 9.0  # (0.5 - 3.5)^2
    assert scores.grad.tolist() == [[-6.0, 6.0]]


def test_margin_mse_keeps_its_digits_far_from_zero():
    """The closed form would lose them in n sum e^2 - (sum e)^2."""
    scores = torch.tensor([[0.25, 0.5, 0.0]])
    assert margin_mse(scores + 4096, scores * 2 - 4096).item() == pytest.approx(
        margin_mse(scores, scores * 2).item(), rel=1e-6
    )


@pytest.mark.parametrize("temperature", [1.0, 0.5, 4.0])
def test_kl_distillation_is_the_mean_over_groups_of_several_documents(temperature):
    total = sum(slow_divergence(*row, temperature) for row in ROWS)
    assert count_groups_of_several(TEACHER, MASK) == 2
    loss = kl_distillation(SCORES, TEACHER, MASK, temperature=temperature)
    assert loss.item() == pytest.approx(total / 2, rel=1e-5)
    assert kl_distillation(SCORES, TEACHER, MASK, "sum", temperature).item() == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_gradient_of_kl_is_temperature_times_the_distributions_difference(temperature):
    scores = SCORES.clone().requires_grad_()
    kl_distillation(scores, TEACHER, MASK, "sum", temperature).backward()
    student, target = softmax(ROWS[0][0], temperature), softmax(ROWS[0][1], temperature)
    expected = [temperature * (s - t) for s, t in zip(student, target, strict=True)]
    assert scores.grad[0].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", [margin_mse, kl_distillation])
def test_the_teachers_scores_plus_any_number_have_no_loss(loss):
    assert loss(TEACHER, TEACHER, MASK).item() == pytest.approx(0.0, abs=1e-6)
    assert loss(TEACHER + 3.0, TEACHER, MASK).item() == pytest.approx(0.0, abs=1e-5)


@pytest.mark.parametrize("loss", [margin_mse, kl_distillation])
def test_equal_teacher_scores_pull_scores_together(loss):
    scores = torch.tensor([[2.0, -1.0]], requires_grad=True)
    loss(scores, torch.tensor([[0.5, 0.5]])).backward()
    assert scores.grad[0, 1] < 0 < scores.grad[0, 0]


def test_a_document_to_which_the_teacher_gives_no_probability_costs_nothing():
    scores = torch.tensor([[1.0, 0.0, -500.0]], requires_grad=True)
    loss = kl_distillation(scores, torch.tensor([[1.0, 0.0, -500.0]]))
    loss.backward()
    assert loss.item() == pytest.approx(0.0, abs=1e-6) and torch.isfinite(scores.grad).all()


def test_chance_is_the_loss_of_any_constant():
    for constant in (-3.0, 0.0, 20.0):
        flat = torch.full((4, 3), constant)
        assert margin_mse(flat, TEACHER, MASK).item() == pytest.approx(constant_margin_mse(TEACHER, MASK), rel=1e-5)
        for temperature in (1.0, 2.0):
            loss = kl_distillation(flat, TEACHER, MASK, temperature=temperature).item()
            warm = replace(LOSSES["kl_distillation"], option_values={"temperature": temperature})
            assert loss == pytest.approx(warm.constant_score_loss(TEACHER, MASK), rel=1e-5)
    # the three margins of the first group are 9.5, 4 and 5.5; the one of the second is 0
    assert constant_margin_mse(TEACHER, MASK) == pytest.approx((9.5**2 + 4**2 + 5.5**2) / 4, rel=1e-6)
