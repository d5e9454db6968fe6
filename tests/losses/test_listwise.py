"""Listwise cross entropy against hand values and plain Python."""

import math

import pytest
import torch

from rag_retrieval.losses import chance_listwise_ce, count_groups, listwise_ce

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
def test_listwise_ce_is_the_mean_over_groups_and_filler_rows_do_not_count(temperature):
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


def test_the_positive_is_pushed_up_and_every_negative_down():
    scores = torch.tensor([[0.2, -3.0, 5.0]], requires_grad=True)
    listwise_ce(scores, torch.tensor([[0.0, 1.0, 0.0]])).backward()
    assert (scores.grad[0] > 0).tolist() == [True, False, True]
    assert scores.grad[0, 1] < 0


def test_adding_a_number_to_the_scores_of_a_group_changes_nothing():
    shifted = SCORES + torch.tensor([[3.0], [-2.0], [0.5], [8.0]])
    loss = listwise_ce(SCORES, LABELS, MASK).item()
    assert listwise_ce(shifted, LABELS, MASK).item() == pytest.approx(loss, rel=1e-6)


def test_listwise_ce_of_huge_scores_is_the_distance_where_it_is_wrong_and_zero_where_it_is_right():
    scores = torch.tensor([[-1e4, 1e4, 0.0], [1e4, -1e4, 0.0]], requires_grad=True)
    labels, mask = torch.tensor([[1.0, 0.0, 0.0]] * 2), torch.tensor([[True, True, False]] * 2)
    loss = listwise_ce(scores, labels, mask, "sum")
    loss.backward()
    assert loss.item() == 2e4
    assert scores.grad.tolist() == [[-1.0, 1.0, 0.0], [0.0, 0.0, 0.0]]


def test_padding_takes_no_share_of_the_softmax_even_where_all_scores_are_very_low():
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


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan")])
def test_a_temperature_that_is_not_positive_is_refused(temperature):
    with pytest.raises(ValueError, match="temperature .* is not positive"):
        listwise_ce(SCORES, LABELS, MASK, temperature=temperature)


def test_the_count_is_a_plain_int():
    assert type(count_groups(LABELS, MASK)) is int


def test_chance_of_listwise_ce_is_the_mean_log_of_the_group_size():
    expected = (math.log(3) + math.log(2) + math.log(1)) / 3
    assert chance_listwise_ce(LABELS, MASK) == pytest.approx(expected, rel=1e-12)
    for constant in (-3.0, 0.0, 20.0):
        loss = listwise_ce(torch.full((4, 3), constant), LABELS, MASK)
        assert loss.item() == pytest.approx(expected, rel=1e-6)
