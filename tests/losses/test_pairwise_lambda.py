"""LambdaLoss against hand values and a slow implementation in plain Python; truncation, ties, chance."""

import math
from dataclasses import replace
from itertools import permutations

import pytest
import torch
from loss_values import reduced

from rag_retrieval import losses
from rag_retrieval.losses import LOSSES

lambda_loss = reduced(losses.lambda_loss)
count_graded_groups = LOSSES["lambda_loss"].count

SCORES = torch.tensor([[1.0, 2.0, -0.5, 0.7], [0.3, -1.2, 50.0, 50.0], [4.0, 1.0, 0.0, 50.0], [1.0, 2.0, 3.0, 4.0]])
LABELS = torch.tensor([[0.0, 3.0, 1.0, 1.0], [0.0, 1.0, 9.0, 9.0], [1.0, 1.0, 1.0, 9.0], [1.0, 0.0, 0.0, 0.0]])
MASK = torch.tensor([[True] * 4, [True, True, False, False], [True, True, True, False], [False] * 4])
ROWS = [([1.0, 2.0, -0.5, 0.7], [0, 3, 1, 1]), ([0.3, -1.2], [0, 1])]

every_setting = pytest.mark.parametrize(
    ("weights", "top_k"), [(w, k) for w in ("ndcg_loss2pp", "lambdarank") for k in (None, 1, 2, 9)]
)


def inverse_discount(rank: int) -> float:
    return 1 / math.log2(1 + rank)


def slow(scores: list[float], labels: list[int], weights: str, top_k: int | None, order: list[int] | None = None):
    """order: places from the best to the worst; None: by score."""
    order = order or sorted(range(len(scores)), key=lambda place: -scores[place])
    rank = {place: position for position, place in enumerate(order, 1)}
    best = sorted(labels, reverse=True)[:top_k]
    ideal = sum((2**label - 1) * inverse_discount(position) for position, label in enumerate(best, 1))
    total = 0.0
    for i, high in enumerate(labels):
        for j, low in enumerate(labels):
            if high <= low or (top_k is not None and min(rank[i], rank[j]) > top_k):
                continue
            weight = abs(inverse_discount(rank[i]) - inverse_discount(rank[j]))
            if weights == "ndcg_loss2pp":
                apart = abs(rank[i] - rank[j])
                weight += 10 * abs(inverse_discount(apart) - inverse_discount(apart + 1))
            total += weight * (2**high - 2**low) / ideal * math.log2(1 + math.exp(scores[j] - scores[i]))
    return total


@every_setting
def test_the_slow_implementation_gives_the_same(weights, top_k):
    total = sum(slow(*row, weights, top_k) for row in ROWS)
    options = {"lambda_weights": weights, "lambda_top_k": top_k}
    assert lambda_loss(SCORES, LABELS, MASK, "sum", **options).item() == pytest.approx(total, rel=1e-5)
    assert lambda_loss(SCORES, LABELS, MASK, **options).item() == pytest.approx(total / 2, rel=1e-5)
    assert count_graded_groups(LABELS, MASK) == 2


def test_two_documents_by_hand():
    # the positive is second: |1/log2(3) - 1| of weight, gain 1, and log2(1 + exp(log 3)) = 2
    scores, labels = torch.tensor([[math.log(3.0), 0.0]]), torch.tensor([[0.0, 1.0]])
    swap = 1 - 1 / math.log2(3)
    assert lambda_loss(scores, labels, lambda_weights="lambdarank").item() == pytest.approx(2 * swap, rel=1e-6)
    assert lambda_loss(scores, labels).item() == pytest.approx(2 * 11 * swap, rel=1e-6)


def test_pairs_beyond_the_top_k_get_no_gradient():
    scores = torch.tensor([[4.0, 3.0, 2.0, 1.0]], requires_grad=True)
    lambda_loss(scores, torch.tensor([[1.0, 1.0, 0.0, 1.0]]), lambda_top_k=2).backward()
    assert scores.grad[0, 3] == 0, "the last two are both beyond the second rank"
    assert scores.grad[0, 0] < 0 and scores.grad[0, 1] < 0 < scores.grad[0, 2]


def test_equal_scores_rank_the_lower_label_first():
    labels = [0, 2, 1]
    expected = slow([0.0] * 3, labels, "lambdarank", None, order=[0, 2, 1])
    for places in permutations(range(3)):
        moved = torch.tensor([[float(labels[place]) for place in places]])
        value = lambda_loss(torch.zeros(1, 3), moved, lambda_weights="lambdarank").item()
        assert value == pytest.approx(expected, rel=1e-6)


@every_setting
def test_chance_is_the_mean_over_all_orders_of_equal_scores(weights, top_k):
    expected = 0.0
    for scores, labels in ROWS:
        orders = list(permutations(range(len(labels))))
        losses = [slow([0.0] * len(scores), labels, weights, top_k, list(order)) for order in orders]
        expected += sum(losses) / len(orders) / 2
    loss = replace(LOSSES["lambda_loss"], option_values={"lambda_weights": weights, "lambda_top_k": top_k})
    assert loss.constant_score_loss(LABELS, MASK) == pytest.approx(expected, rel=1e-9)


def test_a_score_as_low_as_float32_goes_still_ranks_before_padding():
    lowest = torch.finfo(torch.float32).min
    scores, mask = torch.tensor([[lowest, 1.0, 7.0]]), torch.tensor([[True, True, False]])
    scores = scores.requires_grad_()
    lambda_loss(scores, torch.tensor([[0.0, 1.0, 1.0]]), mask, lambda_weights="lambdarank").backward()
    assert torch.isfinite(scores.grad).all()


def test_unknown_weights_are_refused():
    with pytest.raises(ValueError, match="lambda_weights 'ndcg' is unknown; use 'ndcg_loss2pp' or 'lambdarank'"):
        lambda_loss(SCORES, LABELS, MASK, lambda_weights="ndcg")
