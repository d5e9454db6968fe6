"""ADR-MSE against hand values and plain Python."""

import math

import pytest
import torch
from loss_values import reduced

from rag_retrieval import losses
from rag_retrieval.losses import LOSSES

adr_mse = reduced(losses.adr_mse)
constant_adr_mse = LOSSES["adr_mse"].constant_score_loss
count_graded_documents = LOSSES["adr_mse"].count

SCORES = torch.tensor([[1.0, 2.0, -0.5, 0.7], [0.3, -1.2, 50.0, 50.0], [4.0, 1.0, 50.0, 50.0], [1.0, 2.0, 3.0, 4.0]])
LABELS = torch.tensor([[0.0, 2.0, 1.0, 1.0], [1.0, 0.0, 9.0, 9.0], [1.0, 1.0, 9.0, 9.0], [1.0, 0.0, 0.0, 0.0]])
MASK = torch.tensor([[True] * 4, [True, True, False, False], [True, True, False, False], [False] * 4])
# with the ranks that the labels ask for, ties sharing theirs
ROWS = [([1.0, 2.0, -0.5, 0.7], [4.0, 1.0, 2.5, 2.5]), ([0.3, -1.2], [1.0, 2.0])]


def slow(scores: list[float], ranks: list[float]) -> float:
    total = 0.0
    for i, (score, rank) in enumerate(zip(scores, ranks, strict=True)):
        above = sum(1 / (1 + math.exp(score - other)) for j, other in enumerate(scores) if j != i)
        total += (rank - (1 + above)) ** 2 / math.log2(1 + rank)
    return total


def test_adr_mse_is_the_mean_over_documents_of_graded_groups():
    total = sum(slow(*row) for row in ROWS)
    assert adr_mse(SCORES, LABELS, MASK, "sum").item() == pytest.approx(total, rel=1e-5)
    assert adr_mse(SCORES, LABELS, MASK).item() == pytest.approx(total / 6, rel=1e-5)
    assert count_graded_documents(LABELS, MASK) == 6


def test_two_documents_by_hand():
    # sigmoid(log 3) = 3/4: approximate ranks 1.75 and 1.25, where 1 and 2 are right
    scores, labels = torch.tensor([[0.0, math.log(3.0)]]), torch.tensor([[1.0, 0.0]])
    expected = (0.75**2 / 1 + 0.75**2 / math.log2(3)) / 2
    assert adr_mse(scores, labels).item() == pytest.approx(expected, rel=1e-6)


def test_adr_mse_is_zero_for_the_right_order_with_ties_tied():
    labels = torch.tensor([[3.0, 2.0, 2.0, 0.0]])
    assert adr_mse(torch.tensor([[90.0, 40.0, 40.0, -30.0]]), labels).item() == pytest.approx(0.0, abs=1e-9)
    assert adr_mse(torch.tensor([[90.0, 60.0, 40.0, -30.0]]), labels).item() > 0.05


def test_documents_ranked_too_low_are_pushed_up_and_those_too_high_down():
    scores = torch.tensor([[0.2, -1.0, 1.5]], requires_grad=True)
    adr_mse(scores, torch.tensor([[1.0, 2.0, 0.0]])).backward()
    assert scores.grad[0, 1] < 0 < scores.grad[0, 2]
    assert scores.grad.sum().item() == pytest.approx(0.0, abs=1e-6)


def test_an_error_at_the_top_weighs_more_than_one_further_down():
    labels = torch.tensor([[3.0, 2.0, 1.0, 0.0]])
    top, bottom = torch.tensor([[20.0, 30.0, 10.0, 0.0]]), torch.tensor([[30.0, 20.0, 0.0, 10.0]])
    assert adr_mse(top, labels).item() > adr_mse(bottom, labels).item()


def test_only_label_order_and_score_differences_matter():
    value = adr_mse(SCORES, LABELS, MASK).item()
    assert adr_mse(SCORES, 10 * LABELS - 3, MASK).item() == pytest.approx(value, rel=1e-6)
    assert adr_mse(SCORES + 2.0, LABELS, MASK).item() == pytest.approx(value, rel=1e-5)


def test_chance_is_the_loss_of_any_constant():
    for constant in (-3.0, 0.0, 20.0):
        value = adr_mse(torch.full((4, 4), constant), LABELS, MASK).item()
        assert value == pytest.approx(constant_adr_mse(LABELS, MASK), rel=1e-5)
    # every document in the middle: 2.5 of four, 1.5 of two
    expected = 1.5**2 / math.log2(5) + 1.5**2 / 1 + 0.5**2 / 1 + 0.5**2 / math.log2(3)
    assert constant_adr_mse(LABELS, MASK) == pytest.approx(expected / 6, rel=1e-6)
