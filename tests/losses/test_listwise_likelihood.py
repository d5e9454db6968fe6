"""ListMLE and its position-aware form against hand values, plain Python, and the Plackett-Luce probability."""

import math
from itertools import permutations

import pytest
import torch
from loss_values import reduced

from rag_retrieval import losses
from rag_retrieval.losses import LOSSES

listmle, listwise_ce, position_listmle = map(reduced, (losses.listmle, losses.listwise_ce, losses.position_listmle))
constant_listmle = LOSSES["listmle"].constant_score_loss
constant_position_listmle = LOSSES["position_listmle"].constant_score_loss
count_graded_groups = LOSSES["listmle"].count

SCORES = torch.tensor([[1.0, 2.0, -0.5, 0.7], [0.3, -1.2, 50.0, 50.0], [4.0, 1.0, 0.0, 50.0], [1.0, 2.0, 3.0, 4.0]])
LABELS = torch.tensor([[0.0, 2.0, 1.0, 1.0], [1.0, 0.0, 9.0, 9.0], [1.0, 1.0, 1.0, 9.0], [1.0, 0.0, 0.0, 0.0]])
MASK = torch.tensor([[True] * 4, [True, True, False, False], [True, True, True, False], [False] * 4])


def slow_terms(scores: list[float], labels: list[float]) -> list[float]:
    """One term for each document above the lowest label."""
    return [
        -math.log(math.exp(s) / sum(math.exp(other) for other, y in zip(scores, labels, strict=True) if y <= label))
        for s, label in zip(scores, labels, strict=True)
        if label > min(labels)
    ]


def slow_weights(labels: list[float]) -> list[float]:
    """The weight of each document above the lowest label, mean over the ranks that its label has."""
    ranked = sorted(labels, reverse=True)
    weights = [2 ** (len(labels) - rank) - 1 for rank in range(1, len(labels) + 1)]
    means = {}
    for label in set(labels):
        of_label = [weight for weight, other in zip(weights, ranked, strict=True) if other == label]
        means[label] = sum(of_label) / len(of_label) / sum(weights)
    return [means[label] for label in labels if label > min(labels)]


def test_listmle_of_three_documents_by_hand():
    # exp(scores) are 1, 2, 3 and the right order is the third, the first, the second: 3/6 * 1/3
    scores = torch.tensor([[0.0, math.log(2.0), math.log(3.0)]])
    loss = listmle(scores, torch.tensor([[1.0, 0.0, 2.0]]))
    assert loss.item() == pytest.approx(math.log(6.0), rel=1e-6)


def test_listmle_of_different_labels_is_the_plackett_luce_log_probability():
    scores = torch.tensor([[0.4, -1.0, 2.0, 0.1]])
    losses = [listmle(scores, torch.tensor([order], dtype=torch.float32)).item() for order in permutations(range(4))]
    assert sum(math.exp(-loss) for loss in losses) == pytest.approx(1.0, rel=1e-5)


def test_with_a_tied_lowest_level_it_is_the_top_k_probability():
    """The sum over all orders of the tail: leaving its terms out is exact."""
    scores = torch.tensor([[0.4, -1.0, 2.0, 0.1]])
    orders = [(9, 8, *tail) for tail in permutations((1, 2))]
    whole = sum(math.exp(-listmle(scores, torch.tensor([order], dtype=torch.float32)).item()) for order in orders)
    assert listmle(scores, torch.tensor([[9.0, 8.0, 0.0, 0.0]])).item() == pytest.approx(-math.log(whole), rel=1e-5)


def test_listmle_is_the_mean_over_groups_with_different_labels():
    rows = [([1.0, 2.0, -0.5, 0.7], [0, 2, 1, 1]), ([0.3, -1.2], [1, 0])]
    total = sum(sum(slow_terms(*row)) for row in rows)
    assert listmle(SCORES, LABELS, MASK).item() == pytest.approx(total / 2, rel=1e-6)
    assert listmle(SCORES, LABELS, MASK, "sum").item() == pytest.approx(total, rel=1e-6)
    assert count_graded_groups(LABELS, MASK) == 2 and type(count_graded_groups(LABELS, MASK)) is int


def test_position_listmle_weights_the_terms_with_their_ranks():
    rows = [([1.0, 2.0, -0.5, 0.7], [0, 2, 1, 1]), ([0.3, -1.2], [1, 0])]
    total = 0.0
    for scores, labels in rows:
        total += sum(a * b for a, b in zip(slow_terms(scores, labels), slow_weights(labels), strict=True))
    assert position_listmle(SCORES, LABELS, MASK, "sum").item() == pytest.approx(total, rel=1e-6)
    assert position_listmle(SCORES, LABELS, MASK).item() == pytest.approx(total / 2, rel=1e-6)


def test_position_weights_by_hand():
    # of four documents: 7, 3, 1, 0, of 11 in all; equal scores make each term the log of its pool
    loss = position_listmle(torch.zeros(1, 4), torch.tensor([[3.0, 2.0, 1.0, 0.0]]))
    expected = (7 * math.log(4) + 3 * math.log(3) + 1 * math.log(2)) / 11
    assert loss.item() == pytest.approx(expected, rel=1e-6)


def test_position_weights_of_200_documents_are_finite_and_halve_each_rank():
    labels = torch.arange(200.0, 0.0, -1.0).unsqueeze(0)
    loss = position_listmle(torch.zeros(1, 200), labels).item()
    assert loss == pytest.approx(sum(2.0**-rank * math.log(201 - rank) for rank in range(1, 200)), rel=1e-5)


def test_with_one_positive_listmle_is_the_listwise_cross_entropy():
    scores = torch.tensor([[0.2, -3.0, 5.0, 1.0]])
    labels = torch.tensor([[0.0, 1.0, 0.0, 0.0]])
    assert listmle(scores, labels).item() == pytest.approx(listwise_ce(scores, labels).item(), rel=1e-6)


@pytest.mark.parametrize("loss", [listmle, position_listmle])
def test_the_best_document_is_pushed_up_and_the_worst_down(loss):
    scores = torch.tensor([[0.2, -3.0, 5.0]], requires_grad=True)
    loss(scores, torch.tensor([[1.0, 2.0, 0.0]])).backward()
    assert scores.grad[0, 1] < 0 < scores.grad[0, 2]
    assert scores.grad.sum().item() == pytest.approx(0.0, abs=1e-6)


@pytest.mark.parametrize("loss", [listmle, position_listmle])
def test_documents_with_equal_labels_and_scores_have_equal_gradients(loss):
    scores = torch.tensor([[0.5, 1.0, 0.5, -1.0, -1.0]], requires_grad=True)
    loss(scores, torch.tensor([[2.0, 1.0, 2.0, 0.0, 0.0]])).backward()
    assert scores.grad[0, 0].item() == pytest.approx(scores.grad[0, 2].item())
    assert scores.grad[0, 3].item() == pytest.approx(scores.grad[0, 4].item())


@pytest.mark.parametrize("loss", [listmle, position_listmle])
def test_only_label_order_and_score_differences_matter(loss):
    value = loss(SCORES, LABELS, MASK).item()
    assert loss(SCORES, 10 * LABELS - 3, MASK).item() == pytest.approx(value, rel=1e-6)
    shifted = SCORES + torch.tensor([[3.0], [-2.0], [0.5], [8.0]])
    assert loss(shifted, LABELS, MASK).item() == pytest.approx(value, rel=1e-5)


def test_equal_scores_far_from_zero_keep_their_digits():
    labels = torch.tensor([[2.0, 1.0, 0.0]])
    for constant in (0.0, -3e4, 3e6):
        assert listmle(torch.full((1, 3), constant), labels).item() == pytest.approx(math.log(6), rel=1e-6)


@pytest.mark.parametrize(
    ("loss", "chance"), [(listmle, constant_listmle), (position_listmle, constant_position_listmle)]
)
def test_chance_is_the_loss_of_any_constant(loss, chance):
    for constant in (-3.0, 0.0, 20.0):
        value = loss(torch.full((4, 4), constant), LABELS, MASK).item()
        assert value == pytest.approx(chance(LABELS, MASK), rel=1e-5)
    # group 1: the first of four, then twice of three; group 2: the first of two
    assert constant_listmle(LABELS, MASK) == pytest.approx((math.log(4) + 2 * math.log(3) + math.log(2)) / 2, rel=1e-6)
