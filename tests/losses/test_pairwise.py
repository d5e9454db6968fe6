"""RankNet against hand values and a loop over documents in plain Python."""

import math

import pytest
import torch
from loss_values import reduced

from rag_retrieval import losses
from rag_retrieval.losses import LOSSES

ranknet = reduced(losses.ranknet)
constant_ranknet = LOSSES["pairwise_ranknet"].constant_score_loss
count_ordered_pairs = LOSSES["pairwise_ranknet"].count


def slow_ranknet(scores: list[list[float]], labels: list[list[float]]) -> tuple[float, int]:
    """Sum and number of ordered pairs; groups are lists without padding."""
    total, pairs = 0.0, 0
    for group_scores, group_labels in zip(scores, labels, strict=True):
        for s_i, r_i in zip(group_scores, group_labels, strict=True):
            for s_j, r_j in zip(group_scores, group_labels, strict=True):
                if r_i < r_j:
                    total += (r_j - r_i) * math.log(1 + math.exp(s_i - s_j))
                    pairs += 1
    return total, pairs


RAGGED_SCORES = [[0.5, -1.0, 2.0, 0.3], [1.5, -0.7], [0.2], [0.1, 0.9, -0.4]]
RAGGED_LABELS = [[2.0, 0.0, 1.0, 1.0], [0.0, 1.0], [1.0], [0.5, 0.5, 0.5]]


def padded(rows: list[list[float]], filler: float) -> torch.Tensor:
    width = max(len(row) for row in rows)
    return torch.tensor([row + [filler] * (width - len(row)) for row in rows])


def ragged() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    scores, labels = padded(RAGGED_SCORES, 7.0), padded(RAGGED_LABELS, 3.0)
    mask = padded([[1.0] * len(row) for row in RAGGED_SCORES], 0.0).bool()
    return scores, labels, mask


def test_ranknet_of_three_documents_by_hand():
    scores, labels = torch.tensor([[1.0, 0.0, 3.0]]), torch.tensor([[2.0, 1.0, 0.0]])
    # Pairs (worse, better): (1, 0) weight 1, (2, 0) weight 2, (2, 1) weight 1.
    total = math.log1p(math.exp(-1)) + 2 * math.log1p(math.exp(2)) + math.log1p(math.exp(3))
    assert ranknet(scores, labels, reduction="sum").item() == pytest.approx(total, rel=1e-6)
    assert ranknet(scores, labels).item() == pytest.approx(total / 3, rel=1e-6)
    assert count_ordered_pairs(labels, None) == 3


def test_ranknet_agrees_with_a_loop_over_groups_of_different_size():
    total, pairs = slow_ranknet(RAGGED_SCORES, RAGGED_LABELS)
    scores, labels, mask = ragged()
    assert pairs == 6  # (2,1,1,0): 5 pairs; (0,1): 1; one document and equal labels: none
    assert count_ordered_pairs(labels, mask) == pairs
    assert ranknet(scores, labels, mask, reduction="sum").item() == pytest.approx(total, rel=1e-6)
    assert ranknet(scores, labels, mask).item() == pytest.approx(total / pairs, rel=1e-6)


def test_ranknet_gradient_agrees_with_finite_differences_of_the_loop():
    scores, labels, mask = ragged()
    scores.requires_grad_()
    ranknet(scores, labels, mask, reduction="sum").backward()
    h = 1e-5
    for group, row in enumerate(RAGGED_SCORES):
        for document in range(len(row)):
            up, down = ([list(r) for r in RAGGED_SCORES] for _ in range(2))
            up[group][document] += h
            down[group][document] -= h
            rise = slow_ranknet(up, RAGGED_LABELS)[0] - slow_ranknet(down, RAGGED_LABELS)[0]
            slope = rise / (2 * h)
            assert scores.grad[group, document].item() == pytest.approx(slope, rel=1e-5, abs=1e-6)


def test_adding_a_number_to_the_scores_of_a_group_changes_nothing():
    scores, labels, mask = ragged()
    shifted = scores + torch.tensor([[3.0], [-2.0], [0.5], [8.0]])
    loss = ranknet(scores, labels, mask).item()
    assert ranknet(shifted, labels, mask).item() == pytest.approx(loss, rel=1e-6)


def test_documents_of_different_groups_are_never_compared():
    scores, labels = torch.tensor([[5.0, 5.0], [-5.0, -5.0]]), torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    assert ranknet(scores, labels, reduction="sum").item() == 0.0
    assert count_ordered_pairs(labels, None) == 0


def test_labels_below_zero_and_above_one_weigh_by_their_difference():
    scores, labels = torch.zeros(1, 2), torch.tensor([[-3.0, 4.5]])
    assert ranknet(scores, labels).item() == pytest.approx(7.5 * math.log(2), rel=1e-6)


def test_padding_is_never_the_better_document_of_a_pair_with_negative_labels():
    # Padding is filled with label 0, which is above every label here.
    scores, mask = torch.zeros(1, 3), torch.tensor([[True, True, False]])
    labels = torch.tensor([[-2.0, -1.0, 0.0]])
    assert ranknet(scores, labels, mask, reduction="sum").item() == pytest.approx(math.log(2), rel=1e-6)
    assert count_ordered_pairs(labels, mask) == 1


def test_ranknet_of_huge_scores_is_their_difference_if_wrong_else_zero():
    scores = torch.tensor([[1e4, -1e4], [1e4, -1e4]], requires_grad=True)
    loss = ranknet(scores, torch.tensor([[0.0, 1.0], [1.0, 0.0]]), reduction="sum")
    loss.backward()
    assert loss.item() == 2e4
    assert scores.grad.tolist() == [[1.0, -1.0], [0.0, 0.0]]


def test_the_count_compares_labels_in_float32_as_the_loss_does():
    labels = torch.tensor([[0.1, 0.1 + 1e-12]], dtype=torch.float64)
    assert count_ordered_pairs(labels, None) == 0
    assert ranknet(torch.zeros(1, 2), labels, reduction="sum").item() == 0.0


def test_chance_of_ranknet_is_log_two_times_the_mean_difference_of_labels():
    labels, mask = torch.tensor([[0.0, 1.0, 3.0, 9.0]]), torch.tensor([[True, True, True, False]])
    assert constant_ranknet(labels, mask) == pytest.approx(math.log(2) * (1 + 3 + 2) / 3, rel=1e-6)
    for constant in (-3.0, 0.0, 20.0):
        loss = ranknet(torch.full((1, 4), constant), labels, mask)
        assert loss.item() == pytest.approx(constant_ranknet(labels, mask), rel=1e-6)
