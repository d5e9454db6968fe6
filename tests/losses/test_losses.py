"""The table of losses, and the rules that each obeys on padding, dtype, gradients and micro-batches."""

import dataclasses
import inspect
import subprocess
import sys

import pytest
import torch

from rag_retrieval.losses import ALIASES, LOSSES, Loss

every_loss = pytest.mark.parametrize("loss", LOSSES.values(), ids=LOSSES.keys())


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


def mean(loss: Loss, scores, labels, mask=None) -> torch.Tensor:
    total, count = loss(scores, labels, mask)
    return total / count.clamp(min=1)


def gradient(loss: Loss, scores, labels, mask) -> torch.Tensor:
    """Of the sum."""
    leaf = scores.detach().clone().requires_grad_()
    loss(leaf, labels, mask)[0].backward()
    return leaf.grad


def test_the_table_has_the_documented_names():
    assert list(LOSSES) == [
        "point_ce", "point_mse", "pairwise_ranknet", "listwise_ce", "listnet", "listmle", "position_listmle",
        "lambda_loss", "info_nce", "adr_mse", "margin_mse", "kl_distillation",
    ]  # fmt: skip
    assert ALIASES == {"pointwise_bce": "point_ce", "pointwise_mse": "point_mse"}
    assert [name for name, loss in LOSSES.items() if loss.dataset_type == "pointwise"] == ["point_ce", "point_mse"]
    assert [name for name, loss in LOSSES.items() if loss.reads == "teacher_score"] == ["margin_mse", "kl_distillation"]
    assert [name for name, loss in LOSSES.items() if loss.reads == "positive"] == ["listwise_ce", "info_nce"]


def test_the_table_is_read_without_torch():
    code = "import sys, rag_retrieval.losses, rag_retrieval.losses.custom; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


@every_loss
def test_the_options_are_keyword_arguments_of_the_function_with_the_same_defaults(loss):
    signature = inspect.signature(loss.function).parameters
    assert list(signature)[:3] in (["scores", "labels", "mask"], ["scores", "teacher_scores", "mask"])
    assert (list(signature)[1] == "teacher_scores") == (loss.reads == "teacher_score")
    defaults = {name: parameter.default for name, parameter in list(signature.items())[3:]}
    assert defaults == {option.name: option.default for option in loss.options}


def test_a_temperature_that_is_not_positive_is_refused():
    with_temperature = [loss for loss in LOSSES.values() if "temperature" in [option.name for option in loss.options]]
    assert [loss.name for loss in with_temperature] == ["listwise_ce", "info_nce", "kl_distillation"]
    for loss in with_temperature:
        for temperature in (0.0, -1.0, float("nan")):
            with pytest.raises(ValueError, match="temperature .* is not positive"):
                dataclasses.replace(loss, option_values={"temperature": temperature})(*batch(loss))


def test_options_that_are_set_reach_the_loss_and_its_constant_score():
    scores, labels, mask = batch(LOSSES["lambda_loss"])
    at_one = dataclasses.replace(LOSSES["lambda_loss"], option_values={"lambda_top_k": 1})
    assert at_one(scores, labels, mask)[0] != LOSSES["lambda_loss"](scores, labels, mask)[0]
    assert at_one.constant_score_loss(labels, mask) != LOSSES["lambda_loss"].constant_score_loss(labels, mask)


@every_loss
def test_padding_changes_nothing_and_has_a_gradient_of_exactly_zero(loss):
    scores, labels, mask = batch(loss)
    grad = gradient(loss, scores, labels, mask)
    assert (grad[mask] != 0).any()
    for garbage in (float("nan"), float("inf"), float("-inf"), 1e30, -7.0):
        bad_scores, bad_labels = scores.masked_fill(~mask, garbage), labels.masked_fill(~mask, garbage)
        assert list(map(float, loss(bad_scores, bad_labels, mask))) == list(map(float, loss(scores, labels, mask)))
        assert loss.count(bad_labels, mask) == loss.count(labels, mask)
        assert loss.constant_score_loss(bad_labels, mask) == loss.constant_score_loss(labels, mask)
        bad_grad = gradient(loss, bad_scores, bad_labels, mask)
        assert torch.equal(grad, bad_grad) and (bad_grad[~mask] == 0).all()


@every_loss
def test_no_mask_is_the_same_as_a_mask_without_padding(loss):
    scores, labels, mask = batch(loss)
    everything = torch.ones_like(mask)
    assert list(map(float, loss(scores, labels))) == list(map(float, loss(scores, labels, everything)))
    assert loss.constant_score_loss(labels) == loss.constant_score_loss(labels, everything)


@every_loss
def test_the_count_is_known_before_the_scores(loss):
    scores, labels, mask = batch(loss)
    assert loss.count(labels, mask) == int(loss(scores, labels, mask)[1]) > 0
    assert type(loss.count(labels, mask)) is int


@every_loss
def test_sums_and_gradients_of_micro_batches_add_up_to_the_whole_step(loss):
    scores, labels, mask = batch(loss)
    total, count = loss(scores, labels, mask)
    for sizes in ([8], [1] * 8, [3, 3, 2], [7, 1]):
        if loss.dataset_type == "pointwise":
            sizes = [5 * size for size in sizes]
        parts = list(zip(scores.split(sizes), labels.split(sizes), mask.split(sizes), strict=True))
        assert sum(loss.count(y, m) for _, y, m in parts) == count
        assert sum(loss(*part)[0].item() for part in parts) == pytest.approx(total.item(), rel=1e-6)
        grads = torch.cat([gradient(loss, *part) for part in parts])
        torch.testing.assert_close(grads, gradient(loss, scores, labels, mask))


@every_loss
def test_the_order_of_documents_does_not_matter_and_gradients_follow_it(loss):
    scores, labels, mask = batch(loss)
    order = torch.randperm(scores.shape[-1], generator=torch.Generator().manual_seed(3))
    moved = scores[..., order], labels[..., order], mask[..., order]
    assert mean(loss, *moved).item() == pytest.approx(mean(loss, scores, labels, mask).item(), rel=1e-6)
    torch.testing.assert_close(gradient(loss, *moved), gradient(loss, scores, labels, mask)[..., order])
    assert loss.count(*moved[1:]) == loss.count(labels, mask)
    assert loss.constant_score_loss(*moved[1:]) == pytest.approx(loss.constant_score_loss(labels, mask), rel=1e-6)


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
def test_a_batch_with_nothing_to_learn_gives_zero_with_a_graph(loss):
    for scores, labels, mask in nothing_to_learn(loss):
        leaf = scores.clone().requires_grad_()
        with torch.autograd.set_detect_anomaly(True):  # fails on a nan in any intermediate gradient
            value = loss(leaf, labels, mask)[0]
            value.backward()
        assert value.item() == 0.0
        assert leaf.grad is not None and (leaf.grad == 0).all()
        if loss.dataset_type == "grouped" or not mask.any():
            assert loss.count(labels, mask) == 0
            assert loss.constant_score_loss(labels, mask) == 0.0


@every_loss
def test_one_pair_or_one_group_of_one_document_gives_a_finite_scalar(loss):
    shape = (1,) if loss.dataset_type == "pointwise" else (1, 1)
    scores = torch.full(shape, 0.5, requires_grad=True)
    value = mean(loss, scores, torch.ones(shape))
    value.backward()
    assert value.shape == () and torch.isfinite(value)
    assert scores.grad.shape == shape and torch.isfinite(scores.grad).all()


@every_loss
def test_the_loss_is_computed_in_float32_whatever_the_dtype_of_the_scores(loss):
    scores, labels, mask = batch(loss)
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        rounded = scores.to(dtype)
        total = loss(rounded, labels, mask)[0]
        assert total.dtype == torch.float32
        assert total.item() == loss(rounded.float(), labels, mask)[0].item()
        grad = gradient(loss, rounded, labels, mask)
        assert grad.dtype == dtype
        assert torch.equal(grad, gradient(loss, rounded.float(), labels, mask).to(dtype))


@every_loss
def test_autocast_does_not_lower_the_precision_of_the_loss(loss):
    scores, labels, mask = batch(loss)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mean(loss, scores, labels, mask)
    assert inside.dtype == torch.float32
    assert inside.item() == mean(loss, scores, labels, mask).item()


@every_loss
def test_integer_labels_give_the_same_loss_as_float_labels(loss):
    scores, labels, mask = batch(loss)
    assert mean(loss, scores, labels.long(), mask).item() == mean(loss, scores, labels, mask).item()
    assert loss.count(labels.long(), mask) == loss.count(labels, mask)
    assert loss.constant_score_loss(labels.long(), mask) == loss.constant_score_loss(labels, mask)


@every_loss
def test_good_rankings_are_below_the_constant_score_loss_bad_ones_above(loss):
    _, labels, mask = batch(loss)
    # these three are at their best where the scores are the labels
    good = labels if loss.name in ("listnet", "margin_mse", "kl_distillation") else 8 * labels - 4
    bad = 4 - 8 * labels
    assert mean(loss, good, labels, mask).item() < loss.constant_score_loss(labels, mask)
    assert mean(loss, bad, labels, mask).item() > loss.constant_score_loss(labels, mask)


@every_loss
def test_huge_scores_give_finite_losses_and_gradients(loss):
    scores, labels, mask = batch(loss)
    huge = 1e4 * scores.sign()
    assert torch.isfinite(mean(loss, huge, labels, mask))
    assert torch.isfinite(gradient(loss, huge, labels, mask)).all()


@every_loss
def test_a_score_that_is_nan_and_no_padding_makes_the_loss_nan(loss):
    # The training loop stops on it; a loss that hides it would let the weights be spoilt.
    scores, labels, mask = batch(loss)
    scores.view(-1)[0] = float("nan")
    assert mask.view(-1)[0] and torch.isnan(mean(loss, scores, labels, mask))
