"""The softmax losses of a group against hand values and plain Python."""

import math

import pytest
import torch
from loss_values import reduced

from rag_retrieval import losses
from rag_retrieval.losses import LOSSES

info_nce, listnet, listwise_ce = reduced(losses.info_nce), reduced(losses.listnet), reduced(losses.listwise_ce)
constant_info_nce = LOSSES["info_nce"].constant_score_loss
constant_listnet = LOSSES["listnet"].constant_score_loss
constant_listwise_ce = LOSSES["listwise_ce"].constant_score_loss
count_graded_groups = LOSSES["listnet"].count
count_groups = LOSSES["listwise_ce"].count
count_positives = LOSSES["info_nce"].count

# Three groups of 3, 2 and 1 documents, and a filler row; padding carries misleading values.
SCORES = torch.tensor([[1.0, 2.0, -0.5], [0.3, -1.2, 50.0], [4.0, 50.0, 50.0], [1.0, 2.0, 3.0]])
LABELS = torch.tensor([[0.0, 1.0, 0.0], [1.0, 0.0, 1.0], [1.0, 1.0, 1.0], [1.0, 0.0, 0.0]])
MASK = torch.tensor([[True, True, True], [True, True, False], [True, False, False], [False, False, False]])


def slow_term(positive: float, others: list[float], temperature: float = 1.0) -> float:
    everything = [math.exp(s / temperature) for s in [positive, *others]]
    return -math.log(everything[0] / sum(everything))


def test_listwise_ce_of_two_documents_by_hand():
    # exp(log 3) / (exp(log 3) + exp(0)) = 3/4.
    loss = listwise_ce(torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[1.0, 0.0]]))
    assert loss.item() == pytest.approx(math.log(4 / 3), rel=1e-6)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_listwise_ce_is_the_mean_over_groups_without_filler_rows(temperature):
    first = slow_term(2.0, [1.0, -0.5], temperature)
    second = slow_term(0.3, [-1.2], temperature)
    total = first + second  # the group of one document gives 0
    loss = listwise_ce(SCORES, LABELS, MASK, temperature=temperature)
    assert loss.item() == pytest.approx(total / 3, rel=1e-6)
    assert listwise_ce(SCORES, LABELS, MASK, "sum", temperature).item() == pytest.approx(total, rel=1e-6)
    assert count_groups(LABELS, MASK) == 3


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_listwise_gradient_is_softmax_minus_label_over_the_temperature(temperature):
    scores = SCORES.clone().requires_grad_()
    listwise_ce(scores, LABELS, MASK, "sum", temperature).backward()
    weights = [math.exp(s / temperature) for s in (1.0, 2.0, -0.5)]
    softmax = [w / sum(weights) for w in weights]
    expected = [softmax[0] / temperature, (softmax[1] - 1) / temperature, softmax[2] / temperature]
    assert scores.grad[0].tolist() == pytest.approx(expected, rel=1e-5)
    assert scores.grad[2:].tolist() == [[0.0] * 3] * 2


def test_adding_a_number_to_the_scores_of_a_group_changes_nothing():
    shifted = SCORES + torch.tensor([[3.0], [-2.0], [0.5], [8.0]])
    loss = listwise_ce(SCORES, LABELS, MASK).item()
    assert listwise_ce(shifted, LABELS, MASK).item() == pytest.approx(loss, rel=1e-6)


def test_listwise_ce_of_huge_scores_is_their_distance_if_wrong_else_zero():
    scores = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0]], requires_grad=True)
    labels, mask = torch.tensor([[1.0, 0.0, 0.0]] * 2), torch.tensor([[True, True, False]] * 2)
    loss = listwise_ce(scores, labels, mask, "sum")
    loss.backward()
    assert loss.item() == 2e4
    assert scores.grad.tolist() == [[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_padding_takes_no_share_of_the_softmax_of_very_low_scores():
    scores, mask = torch.tensor([[-3e4, -3e4, 0.0]]), torch.tensor([[True, True, False]])
    loss = listwise_ce(scores, torch.tensor([[1.0, 0.0, 0.0]]), mask)
    assert loss.item() == pytest.approx(math.log(2), rel=1e-6)


def test_a_group_without_a_positive_contributes_nothing_and_is_not_counted():
    scores = torch.tensor([[math.log(3.0), 0.0], [5.0, -5.0]], requires_grad=True)
    labels = torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    loss = listwise_ce(scores, labels)
    loss.backward()
    assert loss.item() == pytest.approx(math.log(4 / 3), rel=1e-6)
    assert scores.grad[1].tolist() == [0.0, 0.0]
    assert count_groups(labels, None) == 1


def test_only_a_label_of_exactly_one_is_a_positive():
    labels = torch.tensor([[0.5, 0.0], [2.0, 0.0]])
    assert count_groups(labels, None) == 0
    assert listwise_ce(torch.tensor([[1.0, 2.0], [1.0, 2.0]]), labels, reduction="sum").item() == 0.0


def test_a_positive_that_is_padding_is_no_positive():
    assert count_groups(torch.tensor([[1.0, 0.0]]), torch.tensor([[False, True]])) == 0


def test_chance_of_listwise_ce_is_the_mean_log_of_the_group_size():
    expected = (math.log(3) + math.log(2) + math.log(1)) / 3
    assert constant_listwise_ce(LABELS, MASK) == pytest.approx(expected, rel=1e-6)
    for constant in (-3.0, 0.0, 20.0):
        loss = listwise_ce(torch.full((4, 3), constant), LABELS, MASK)
        assert loss.item() == pytest.approx(expected, rel=1e-6)


# --- ListNet and InfoNCE ---

GRADES = torch.tensor([[0.0, 2.0, 1.0], [1.0, 0.0, 9.0], [1.0, 9.0, 9.0], [1.0, 0.0, 0.0]])


def softmax(values: list[float]) -> list[float]:
    weights = [math.exp(value) for value in values]
    return [weight / sum(weights) for weight in weights]


def test_listnet_is_the_cross_entropy_of_label_and_score_softmax():
    total = 0.0
    for scores, labels in (([1.0, 2.0, -0.5], [0.0, 2.0, 1.0]), ([0.3, -1.2], [1.0, 0.0])):
        total -= sum(p * math.log(q) for p, q in zip(softmax(labels), softmax(scores), strict=True))
    assert listnet(SCORES, GRADES, MASK, "sum").item() == pytest.approx(total, rel=1e-6)
    assert listnet(SCORES, GRADES, MASK).item() == pytest.approx(total / 2, rel=1e-6)


def test_the_gradient_of_listnet_is_the_difference_of_the_distributions():
    scores = SCORES.clone().requires_grad_()
    listnet(scores, GRADES, MASK, "sum").backward()
    pairs = zip(softmax([1.0, 2.0, -0.5]), softmax([0.0, 2.0, 1.0]), strict=True)
    assert scores.grad[0].tolist() == pytest.approx([q - p for q, p in pairs], abs=1e-6)
    assert scores.grad[2:].tolist() == [[0.0] * 3] * 2


def test_listnet_is_least_where_the_scores_are_the_labels_plus_a_number():
    scores = (GRADES[:1] + 5.0).requires_grad_()
    loss = listnet(scores, GRADES[:1])
    loss.backward()
    assert scores.grad[0].tolist() == pytest.approx([0.0] * 3, abs=1e-6)
    assert loss.item() == pytest.approx(-sum(p * math.log(p) for p in softmax([0.0, 2.0, 1.0])), rel=1e-6)


def test_the_listnet_target_of_one_positive_is_as_flat_as_documented():
    assert softmax([1.0, 0.0, 0.0, 0.0]) == pytest.approx([0.48, 0.17, 0.17, 0.17], abs=0.006)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 3.0])
def test_info_nce_takes_each_positive_against_the_negatives_alone(temperature):
    scores, labels = torch.tensor([[1.0, 2.0, -0.5, 0.7]]), torch.tensor([[0.0, 2.0, 1.0, 0.0]])
    terms = [slow_term(2.0, [1.0, 0.7], temperature), slow_term(-0.5, [1.0, 0.7], temperature)]
    assert count_positives(labels) == 2
    assert info_nce(scores, labels, temperature=temperature).item() == pytest.approx(sum(terms) / 2, rel=1e-6)


def test_positives_of_info_nce_do_not_push_each_other_down():
    scores = torch.tensor([[3.0, -3.0, 0.0]], requires_grad=True)
    info_nce(scores, torch.tensor([[1.0, 1.0, 0.0]])).backward()
    assert scores.grad[0, 0] < 0 and scores.grad[0, 1] < 0 < scores.grad[0, 2]


def test_info_nce_of_one_positive_is_listwise_ce():
    labels = torch.tensor([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]])
    for scores in (SCORES[:2], 1e4 * SCORES[:2].sign(), torch.full((2, 3), -3e4)):
        expected = listwise_ce(scores, labels, temperature=0.5).item()
        assert info_nce(scores, labels, temperature=0.5).item() == pytest.approx(expected, rel=1e-6)


def test_chance_of_listnet_and_info_nce_is_the_loss_of_any_constant():
    for constant in (-3.0, 0.0, 20.0):
        flat = torch.full((4, 3), constant)
        assert listnet(flat, GRADES, MASK).item() == pytest.approx((math.log(3) + math.log(2)) / 2, rel=1e-6)
        # two positives with one negative each in the first group, one with one in the second
        assert info_nce(flat, GRADES, MASK).item() == pytest.approx(math.log(2), rel=1e-6)
    assert constant_listnet(GRADES, MASK) == pytest.approx((math.log(3) + math.log(2)) / 2, rel=1e-6)
    assert constant_info_nce(GRADES, MASK) == pytest.approx(math.log(2), rel=1e-6)
