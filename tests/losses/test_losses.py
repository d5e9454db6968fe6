"""The rules that every entry of LOSSES obeys, on padding, dtype, gradients, reduction and micro-batches."""

import dataclasses
import inspect

import pytest
import torch

from rag_retrieval.losses import LOSSES, Loss

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())
GARBAGE = [float("nan"), float("inf"), float("-inf"), 1e30, -7.0]


def batch(loss: Loss) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores, labels with one 1 per group, and a mask with padding: [8, 5], flat for pointwise losses."""
    generator = torch.Generator().manual_seed(7)
    scores = torch.randn(8, 5, generator=generator)
    labels = torch.zeros(8, 5)
    labels[torch.arange(8), torch.randint(0, 2, (8,), generator=generator)] = 1.0
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 5, 4, 2, 5, 3]).unsqueeze(1)
    if loss.dataset_type == "pointwise":
        return scores.flatten(), labels.flatten(), mask.flatten()
    return scores, labels, mask


def gradient(loss: Loss, scores, labels, mask, reduction="mean") -> torch.Tensor:
    leaf = scores.detach().clone().requires_grad_()
    loss.function(leaf, labels, mask, reduction=reduction).backward()
    return leaf.grad


def test_the_registry_has_the_documented_names():
    assert list(LOSSES) == [
        "point_ce", "point_mse", "pairwise_ranknet", "listwise_ce", "listnet", "listmle", "position_listmle",
        "lambda_loss", "info_nce", "adr_mse", "margin_mse", "kl_distillation",
    ]  # fmt: skip
    assert [name for name, loss in LOSSES.items() if loss.dataset_type == "pointwise"] == ["point_ce", "point_mse"]
    assert [name for name, loss in LOSSES.items() if loss.reads == "teacher_score"] == ["margin_mse", "kl_distillation"]
    assert [name for name, loss in LOSSES.items() if loss.reads == "positive"] == ["listwise_ce", "info_nce"]


@every_loss
def test_the_named_options_are_arguments_of_the_function_and_of_chance(loss):
    shared = {"scores", "labels", "teacher_scores", "mask", "reduction"}
    assert set(inspect.signature(loss.function).parameters) - shared == set(loss.options)
    assert set(inspect.signature(loss.chance).parameters) - shared == set(loss.chance_options)


def test_an_entry_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LOSSES["point_ce"].name = "other"


@every_loss
@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_documents_do_not_change_the_loss_the_count_or_chance(loss, garbage):
    scores, labels, mask = batch(loss)
    bad_scores, bad_labels = scores.masked_fill(~mask, garbage), labels.masked_fill(~mask, garbage)
    assert loss.function(bad_scores, bad_labels, mask).item() == loss.function(scores, labels, mask).item()
    assert loss.count(bad_labels, mask) == loss.count(labels, mask)
    assert loss.chance(bad_labels, mask) == loss.chance(labels, mask)


@every_loss
@pytest.mark.parametrize("garbage", GARBAGE)
def test_padding_documents_have_a_gradient_of_exactly_zero(loss, garbage):
    scores, labels, mask = batch(loss)
    bad_scores, bad_labels = scores.masked_fill(~mask, garbage), labels.masked_fill(~mask, garbage)
    grad = gradient(loss, bad_scores, bad_labels, mask)
    assert (grad[~mask] == 0).all()
    assert torch.equal(grad, gradient(loss, scores, labels, mask))
    assert (grad[mask] != 0).any()


@every_loss
def test_no_mask_is_the_same_as_a_mask_without_padding(loss):
    scores, labels, mask = batch(loss)
    everything = torch.ones_like(mask)
    assert loss.function(scores, labels).item() == loss.function(scores, labels, everything).item()
    assert loss.count(labels, None) == loss.count(labels, everything)
    assert loss.chance(labels, None) == loss.chance(labels, everything)


@every_loss
def test_sum_over_count_is_the_mean(loss):
    scores, labels, mask = batch(loss)
    mean = loss.function(scores, labels, mask).item()
    total = loss.function(scores, labels, mask, reduction="sum").item()
    assert mean == pytest.approx(total / loss.count(labels, mask), rel=1e-6)


@every_loss
def test_an_unknown_reduction_is_refused(loss):
    with pytest.raises(ValueError, match="reduction 'average' is unknown; use 'mean' or 'sum'"):
        loss.function(*batch(loss), reduction="average")


@every_loss
@pytest.mark.parametrize("sizes", [[8], [1] * 8, [3, 3, 2], [7, 1]])
def test_sums_and_gradients_of_micro_batches_add_up_to_the_whole_step(loss, sizes):
    scores, labels, mask = batch(loss)
    if loss.dataset_type == "pointwise":
        sizes = [5 * size for size in sizes]
    parts = list(zip(scores.split(sizes), labels.split(sizes), mask.split(sizes), strict=True))
    count = sum(loss.count(y, m) for _, y, m in parts)
    total = sum(loss.function(s, y, m, reduction="sum").item() for s, y, m in parts)
    grads = torch.cat([gradient(loss, s, y, m, reduction="sum") for s, y, m in parts])
    assert count == loss.count(labels, mask)
    assert total / count == pytest.approx(loss.function(scores, labels, mask).item(), rel=1e-6)
    torch.testing.assert_close(grads / count, gradient(loss, scores, labels, mask))


@every_loss
def test_the_order_of_documents_does_not_matter_and_gradients_follow_it(loss):
    scores, labels, mask = batch(loss)
    order = torch.randperm(scores.shape[-1], generator=torch.Generator().manual_seed(3))
    moved = scores[..., order], labels[..., order], mask[..., order]
    assert loss.function(*moved).item() == pytest.approx(loss.function(scores, labels, mask).item(), rel=1e-6)
    torch.testing.assert_close(gradient(loss, *moved), gradient(loss, scores, labels, mask)[..., order])
    assert loss.count(*moved[1:]) == loss.count(labels, mask)
    assert loss.chance(*moved[1:]) == pytest.approx(loss.chance(labels, mask), rel=1e-12)


def nothing_to_learn(loss: Loss) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Batches whose loss is 0: no items, and padding throughout."""
    shape, empty = ((3,), (0,)) if loss.dataset_type == "pointwise" else ((3, 2), (0, 2))
    nan = torch.full(shape, float("nan"))
    cases = [
        (torch.zeros(empty), torch.zeros(empty), torch.ones(empty, dtype=torch.bool)),
        (nan, nan, torch.zeros(shape, dtype=torch.bool)),
    ]
    if loss.dataset_type == "grouped":
        # A group without documents, groups of one, and for labels groups in which all are equal.
        cases.append((torch.zeros(2, 0), torch.zeros(2, 0), torch.ones(2, 0, dtype=torch.bool)))
        cases.append((torch.randn(2, 1), torch.zeros(2, 1), torch.ones(2, 1, dtype=torch.bool)))
    if loss.dataset_type == "grouped" and loss.reads != "teacher_score":
        cases.append((torch.randn(shape), torch.zeros(shape), torch.ones(shape, dtype=torch.bool)))
    return cases


@every_loss
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_a_batch_with_nothing_to_learn_gives_zero_with_a_graph(loss, reduction):
    for scores, labels, mask in nothing_to_learn(loss):
        leaf = scores.clone().requires_grad_()
        with torch.autograd.set_detect_anomaly(True):  # fails on a nan in any intermediate gradient
            value = loss.function(leaf, labels, mask, reduction=reduction)
            value.backward()
        assert value.item() == 0.0
        assert leaf.grad is not None and (leaf.grad == 0).all()
        if loss.dataset_type == "grouped" or not mask.any():
            assert loss.count(labels, mask) == 0
            assert loss.chance(labels, mask) == 0.0


@every_loss
def test_one_pair_or_one_group_of_one_document_gives_a_finite_scalar(loss):
    shape = (1,) if loss.dataset_type == "pointwise" else (1, 1)
    scores = torch.full(shape, 0.5, requires_grad=True)
    value = loss.function(scores, torch.ones(shape))
    value.backward()
    assert value.shape == () and torch.isfinite(value)
    assert scores.grad.shape == shape and torch.isfinite(scores.grad).all()


@every_loss
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_the_loss_is_computed_in_float32_whatever_the_dtype_of_the_scores(loss, dtype):
    scores, labels, mask = batch(loss)
    rounded = scores.to(dtype)
    value = loss.function(rounded, labels, mask)
    assert value.dtype == torch.float32
    assert value.item() == loss.function(rounded.float(), labels, mask).item()
    grad = gradient(loss, rounded, labels, mask)
    assert grad.dtype == dtype
    assert torch.equal(grad, gradient(loss, rounded.float(), labels, mask).to(dtype))


@every_loss
def test_autocast_does_not_lower_the_precision_of_the_loss(loss):
    scores, labels, mask = batch(loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = loss.function(scores, labels, mask)
    assert inside.dtype == torch.float32
    assert inside.item() == loss.function(scores, labels, mask).item()


@every_loss
def test_integer_labels_give_the_same_loss_as_float_labels(loss):
    scores, labels, mask = batch(loss)
    assert loss.function(scores, labels.long(), mask).item() == loss.function(scores, labels, mask).item()
    assert loss.count(labels.long(), mask) == loss.count(labels, mask)
    assert loss.chance(labels.long(), mask) == loss.chance(labels, mask)


@every_loss
def test_a_model_that_ranks_well_is_below_chance_and_one_that_ranks_badly_above(loss):
    _, labels, mask = batch(loss)
    # these three are at their best where the scores are the labels
    good = labels if loss.name in ("listnet", "margin_mse", "kl_distillation") else 8 * labels - 4
    bad = 4 - 8 * labels
    assert loss.function(good, labels, mask).item() < loss.chance(labels, mask)
    assert loss.function(bad, labels, mask).item() > loss.chance(labels, mask)


@every_loss
def test_huge_scores_give_finite_losses_and_gradients(loss):
    scores, labels, mask = batch(loss)
    huge = 1e4 * scores.sign()
    assert torch.isfinite(loss.function(huge, labels, mask))
    assert torch.isfinite(gradient(loss, huge, labels, mask)).all()


@every_loss
def test_a_score_that_is_nan_and_no_padding_makes_the_loss_nan(loss):
    # The training loop stops on it; a loss that hides it would let the weights be spoilt.
    scores, labels, mask = batch(loss)
    scores.view(-1)[0] = float("nan")
    assert mask.view(-1)[0] and torch.isnan(loss.function(scores, labels, mask))
