"""Which parameters decay, and the schedule step by step, at its edges, and over a grid of lengths and proportions."""

import itertools
import math

import pytest
import torch
from tiny_models import tiny_llama, tiny_qwen2, tiny_xlm_roberta
from torch import nn
from transformers import AutoModel

from rag_retrieval.train.optim import (
    make_adamw,
    parameter_groups,
    warmup_stable_cosine,
    without_decay,
)
from rag_retrieval.train.steps import StepShape


class Odd(nn.Module):
    """Names that say nothing: a norm called `scale`, a linear layer called `LayerNorm_projection`."""

    def __init__(self):
        super().__init__()
        self.words = nn.Embedding(5, 4)
        self.scale = nn.LayerNorm(4)
        self.LayerNorm_projection = nn.Linear(4, 4)
        self.biased = nn.Linear(4, 1)


def test_biases_and_norms_have_no_decay_whatever_they_are_called():
    assert without_decay(Odd()) == {
        "scale.weight",
        "scale.bias",
        "LayerNorm_projection.bias",
        "biased.bias",
    }


@pytest.mark.parametrize("family", [tiny_qwen2, tiny_llama, tiny_xlm_roberta])
def test_a_family_has_decay_on_matrices_and_embeddings_but_not_norms(family, tmp_path):
    model = AutoModel.from_pretrained(family(tmp_path))
    spared = without_decay(model)
    for name, parameter in model.named_parameters():
        assert (name in spared) == (parameter.dim() == 1), name


def test_groups_have_their_learning_rate_and_decay():
    model = Odd()
    groups = list(parameter_groups(model, 1e-4, 1e-3, {"biased.weight", "biased.bias"}, 0.01))
    described = [(group["lr"], group["weight_decay"], len(group["params"])) for group in groups]
    assert described == [(1e-4, 0.01, 2), (1e-4, 0.0, 3), (1e-3, 0.01, 1), (1e-3, 0.0, 1)]
    assert groups[2]["params"][0] is model.biased.weight


def test_frozen_parameters_are_in_no_group():
    model = Odd()
    model.words.requires_grad_(False)
    members = [id(p) for group in parameter_groups(model, 1e-4, 1e-3, set(), 0.0) for p in group["params"]]
    assert id(model.words.weight) not in members
    assert len(members) == len(set(members)) == sum(p.requires_grad for p in model.parameters())


def test_decay_shrinks_a_matrix_without_gradient_and_leaves_its_bias():
    """AdamW with zero gradient: w <- w (1 - lr * decay), by hand."""
    layer = nn.Linear(2, 2)
    before = {name: value.detach().clone() for name, value in layer.named_parameters()}
    optimizer = make_adamw(list(parameter_groups(layer, 0.1, 0.1, set(), 0.5)), (0.9, 0.999), 1e-8)
    for parameter in layer.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    torch.testing.assert_close(layer.weight, before["weight"] * 0.95)
    assert torch.equal(layer.bias, before["bias"])


def test_betas_and_epsilon_reach_the_optimizer_which_is_fused():
    optimizer = make_adamw([{"params": [nn.Parameter(torch.ones(1))], "lr": 1.0}], (0.8, 0.95), 1e-5)
    assert optimizer.defaults["betas"] == (0.8, 0.95) and optimizer.defaults["eps"] == 1e-5
    assert optimizer.defaults["fused"]


# --- the schedule ---

PROPORTIONS = [
    pair for pair in itertools.product([0.0, 0.05, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, 1.0], repeat=2) if sum(pair) <= 1.0
] + [(0.7, 0.3), (0.3, 0.7), (2 / 3, 1 / 3), (0.1, 0.9), (0.05, 0.95), (0.55, 0.45)]


def factors(total_steps: int, warmup: float, stable: float) -> list[float]:
    """The factors of all updates, and the one after the last."""
    return [warmup_stable_cosine(step, total_steps, warmup, stable) for step in range(total_steps + 1)]


def test_a_run_of_ten_steps_by_hand():
    # Warmup 2 steps: 1/2, 2/2. Stable 4 steps. Cosine over the 4 that remain: angles 0, 45, 90, 135 degrees.
    half_root = math.sqrt(0.5)
    expected = [0.5, 1, 1, 1, 1, 1, 1, (1 + half_root) / 2, 0.5, (1 - half_root) / 2, 0]
    assert factors(10, 0.2, 0.4) == pytest.approx(expected, abs=1e-12)


def test_without_warmup_and_stable_phase_the_first_update_has_the_full_rate():
    assert factors(2, 0.0, 0.0) == pytest.approx([1.0, 0.5, 0.0], abs=1e-12)


def test_warmup_over_the_whole_run_peaks_at_the_last_update():
    assert factors(4, 1.0, 0.0) == [0.25, 0.5, 0.75, 1.0, 0.0]


def test_a_stable_run_stays_at_the_full_rate_until_it_ends():
    assert factors(3, 0.0, 1.0) == [1.0, 1.0, 1.0, 0.0]


def test_a_run_of_one_step_uses_the_full_rate_once():
    for warmup, stable in PROPORTIONS:
        assert factors(1, warmup, stable) == [1.0, 0.0]


def test_proportions_that_add_up_to_one_leave_no_decay():
    for warmup, stable in [(0.7, 0.3), (2 / 3, 1 / 3), (0.1, 0.9), (0.55, 0.45)]:
        for total_steps in range(1, 61):
            after_warmup = factors(total_steps, warmup, stable)[round(warmup * total_steps) : -1]
            assert after_warmup == [1.0] * len(after_warmup)


def test_a_sum_that_exceeds_one_by_float_error_alone_is_accepted():
    just_above = math.nextafter(0.3, 1.0) + 1e-15
    assert 0.7 + just_above > 1.0
    assert factors(10, 0.7, just_above)[6:] == [1.0, 1.0, 1.0, 1.0, 0.0]


def test_the_factor_rises_in_warmup_then_falls_to_exactly_zero():
    for warmup, stable in PROPORTIONS:
        for total_steps in range(1, 61):
            found = factors(total_steps, warmup, stable)
            peak = max(round(warmup * total_steps) - 1, 0)  # the last step of warmup
            rising, falling = found[: peak + 1], found[peak:]
            assert rising == sorted(rising)
            assert falling == sorted(falling, reverse=True)
            assert found[peak] == 1.0
            assert all(0.0 < factor <= 1.0 for factor in found[:-1])
            assert found[-1] == 0.0


def test_a_long_run_warms_up_holds_and_decays_where_its_proportions_say():
    def factor(step):
        return warmup_stable_cosine(step, 100_000, 0.1, 0.3)

    assert factor(0) == 1 / 10_000
    assert factor(4_999) == 0.5
    assert factor(9_998) < factor(9_999) == factor(40_000) == 1.0
    assert factor(40_001) < 1.0
    assert factor(70_000) == pytest.approx(0.5, abs=1e-12)
    assert 0.0 < factor(99_999) < 1e-8


def test_proportions_are_rounded_to_steps_without_losing_one_to_float_error():
    # 0.29 * 100 is 28.999999999999996 and (0.1 + 0.7) * 10 is 7.999999999999999.
    assert warmup_stable_cosine(27, 100, 0.29, 0.0) == 28 / 29
    assert factors(10, 0.1, 0.7) == pytest.approx([1.0] * 9 + [0.5, 0.0], abs=1e-12)


def test_steps_per_epoch_round_up_over_batch_accumulation_and_processes():
    cases = [
        (64, 32, 1, 1, 2),
        (65, 32, 1, 1, 3),  # a last step of one record
        (64, 8, 4, 1, 2),
        (64, 8, 2, 2, 2),
        (97, 8, 2, 2, 4),  # 32 per step: 3 full ones and one of a single record
        (1, 32, 4, 8, 1),
        (0, 32, 1, 1, 0),
    ]
    for records, batch_size, accumulation, processes, steps in cases:
        assert StepShape(records, batch_size, accumulation, processes).steps_per_epoch == steps


def test_one_process_two_processes_and_accumulation_take_the_same_number_of_steps():
    for records in range(200):
        settings = [(32, 1, 1), (16, 1, 2), (8, 4, 1)]
        assert len({StepShape(records, *setting).steps_per_epoch for setting in settings}) == 1
