"""Values of the pointwise losses by hand, and what a mean label says about a constant score."""

import math

import pytest
import torch
from loss_values import reduced

from rag_retrieval import losses
from rag_retrieval.losses import LOSSES

pointwise_bce, pointwise_mse = reduced(losses.pointwise_bce), reduced(losses.pointwise_mse)
constant_bce = LOSSES["point_ce"].constant_score_loss
constant_mse = LOSSES["point_mse"].constant_score_loss
count_pairs = LOSSES["point_ce"].count

LOG3 = math.log(3.0)  # sigmoid(log 3) = 3/4


def test_bce_of_three_pairs_by_hand():
    # Probabilities 3/4, 3/4, 1/2; labels 1, 0, 1/2.
    loss = pointwise_bce(torch.tensor([LOG3, LOG3, 0.0]), torch.tensor([1.0, 0.0, 0.5]))
    expected = (math.log(4 / 3) + math.log(4) + math.log(2)) / 3
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_mse_of_three_pairs_by_hand():
    # (3/4 - 1)^2 = 1/16, (3/4 - 0)^2 = 9/16, (1/2 - 1/4)^2 = 1/16.
    loss = pointwise_mse(torch.tensor([LOG3, LOG3, 0.0]), torch.tensor([1.0, 0.0, 0.25]))
    assert loss.item() == pytest.approx((1 + 9 + 1) / 16 / 3, rel=1e-6)


def test_bce_gradient_is_probability_minus_label():
    scores = torch.tensor([LOG3, LOG3, 0.0], requires_grad=True)
    pointwise_bce(scores, torch.tensor([1.0, 0.25, 0.5]), reduction="sum").backward()
    assert scores.grad.tolist() == pytest.approx([-0.25, 0.5, 0.0], abs=1e-7)


def test_mse_gradient_is_twice_the_error_times_the_slope_of_the_sigmoid():
    scores = torch.tensor([LOG3, 0.0], requires_grad=True)
    pointwise_mse(scores, torch.tensor([1.0, 0.0]), reduction="sum").backward()
    # 2 (3/4 - 1) (3/4 * 1/4) and 2 (1/2 - 0) (1/2 * 1/2).
    assert scores.grad.tolist() == pytest.approx([-0.09375, 0.25], rel=1e-6)


def test_bce_of_huge_scores_is_their_size_if_wrong_else_zero():
    scores = torch.tensor([1e4, 1e4, -1e4, -1e4], requires_grad=True)
    labels = torch.tensor([1.0, 0.0, 1.0, 0.0])
    loss = pointwise_bce(scores, labels, reduction="sum")
    loss.backward()
    assert loss.item() == 2e4
    assert scores.grad.tolist() == [0.0, 1.0, -1.0, 0.0]


def test_a_label_just_below_one_survives_half_precision_scores():
    # log(1 + e^-9) + 9 (1 - y); in float16 the label would be 1 and the second, larger term would vanish.
    loss = pointwise_bce(torch.tensor([9.0], dtype=torch.float16), torch.tensor([0.99988]))
    assert loss.item() == pytest.approx(math.log1p(math.exp(-9.0)) + 9.0 * (1 - 0.99988), rel=1e-3)


def test_pairs_of_any_shape_are_averaged_alike():
    scores, labels = torch.tensor([0.3, -1.0, 2.0, 0.1]), torch.tensor([1.0, 0.0, 0.5, 0.0])
    for loss in (pointwise_bce, pointwise_mse):
        assert loss(scores.view(2, 2), labels.view(2, 2)).item() == loss(scores, labels).item()


def test_scores_that_would_broadcast_against_the_labels_are_refused():
    with pytest.raises(ValueError, match=r"shapes \[3, 1\], \[3\]"):
        pointwise_mse(torch.zeros(3, 1), torch.zeros(3))
    with pytest.raises(ValueError, match=r"shapes \[3\], \[3\], \[2\]"):
        pointwise_bce(torch.zeros(3), torch.zeros(3), torch.ones(2, dtype=torch.bool))


def test_count_is_the_number_of_pairs_that_are_not_padding():
    labels = torch.tensor([1.0, 0.0, float("nan")])
    count = count_pairs(labels, torch.tensor([True, True, False]))
    assert count == 2 and type(count) is int
    assert count_pairs(labels, None) == 3
    assert count_pairs(torch.zeros(0), None) == 0


def test_chance_of_bce_is_the_entropy_of_the_mean_label():
    # One positive in four: -(1/4) log(1/4) - (3/4) log(3/4).
    expected = 0.25 * math.log(4) + 0.75 * math.log(4 / 3)
    assert constant_bce(torch.tensor([1.0, 0.0, 0.0, 0.0]), None) == pytest.approx(expected, rel=1e-12)
    assert constant_bce(torch.tensor([0.25, 0.25]), None) == pytest.approx(expected, rel=1e-12)
    assert constant_bce(torch.ones(3), None) == 0.0


def test_chance_of_mse_is_the_variance_of_the_labels():
    # Mean 1/2; deviations 1/2, -1/2, 0.
    assert constant_mse(torch.tensor([1.0, 0.0, 0.5]), None) == pytest.approx(0.5 / 3, rel=1e-12)


@pytest.mark.parametrize(("loss", "chance"), [(pointwise_bce, constant_bce), (pointwise_mse, constant_mse)])
def test_the_best_constant_score_is_the_logit_of_the_mean_label(loss, chance):
    labels = torch.tensor([1.0, 0.0, 0.0, 0.7, 0.1, 9.0])
    mask = torch.tensor([True, True, True, True, True, False])
    level = chance(labels, mask)
    for constant in torch.linspace(-4, 4, 81):
        assert loss(constant.expand(6), labels, mask).item() >= level - 1e-6
    best = torch.logit(torch.tensor(1.8 / 5)).expand(6)
    assert loss(best, labels, mask).item() == pytest.approx(level, rel=1e-6)
