"""Scoring changes nothing about the model: modes and gradients come back; and the precision that was asked for."""

import logging

import pytest
import torch
from pair_samples import some_pairs
from torch import nn

from rag_retrieval.models import scoring_mode
from rag_retrieval.models.pair_batch import make_batch


@pytest.fixture
def bert(load_tiny):
    return load_tiny("bert")


def test_a_loaded_model_is_in_eval_mode_and_stays_there(bert):
    assert not any(module.training for module in bert.modules())
    bert.compute_score(["a", "b"])
    assert not any(module.training for module in bert.modules())


def test_dropout_is_off_while_scoring_and_train_mode_comes_back(bert):
    assert any(isinstance(module, nn.Dropout) and module.p > 0 for module in bert.modules())
    expected = bert.compute_score(some_pairs(8))
    bert.train()
    assert torch.equal(bert.compute_score(some_pairs(8)), expected)
    assert all(module.training for module in bert.modules())
    batch = make_batch(bert.pair_encoder.encode(some_pairs(8)))
    assert not torch.equal(bert(batch), bert(batch)), "dropout is not on again"


def test_a_part_that_was_in_eval_mode_during_training_is_so_again(bert):
    bert.train()
    bert.model.bert.embeddings.eval()
    bert.compute_score(["a", "b"])
    assert not bert.model.bert.embeddings.dropout.training
    assert bert.model.bert.encoder.training and bert.model.training and bert.training


def test_the_mode_comes_back_after_an_error(bert, monkeypatch):
    def broken(batch):
        assert not bert.training
        raise RuntimeError("out of something")

    bert.train()
    monkeypatch.setattr(bert, "forward", broken)
    with pytest.raises(RuntimeError, match="out of something"):
        bert.compute_score(["a", "b"])
    assert all(module.training for module in bert.modules())
    assert torch.is_grad_enabled()


def test_scores_carry_no_gradient_and_the_model_trains_on_afterwards(bert):
    scores = bert.compute_score(some_pairs(4))
    assert not scores.requires_grad and not scores.is_inference()
    bert.train()
    bert(make_batch(bert.pair_encoder.encode(some_pairs(4)))).sum().backward()
    assert all(parameter.grad is not None for parameter in bert.parameters())


def test_bf16_is_near_float32_differs_from_it_and_keeps_float32_resolution(bert):
    pairs = some_pairs(20)
    exact = bert.compute_score(pairs)
    assert torch.equal(bert.compute_score(pairs, precision="no"), exact)
    half = bert.compute_score(pairs, precision="bf16")
    torch.testing.assert_close(half, exact, atol=0.3, rtol=0.1)
    assert (half != exact).all()
    assert (half != half.bfloat16().float()).sum() > 15, "rounded to bfloat16"
    assert torch.equal(bert.compute_score(pairs), exact), "autocast is still on"


@pytest.mark.parametrize("precision", ["fp32", "bfloat16", "", torch.bfloat16])
def test_an_unknown_precision_is_refused_with_the_known_ones(bert, precision):
    with pytest.raises(ValueError, match="precision must be None or one of 'no', 'bf16', 'fp16'; found"):
        bert.compute_score(["a", "b"], precision=precision)


def test_fp16_is_refused_on_the_cpu(bert):
    with pytest.raises(ValueError, match="precision 'fp16' needs a GPU"):
        bert.compute_score(["a", "b"], precision="fp16")


@pytest.mark.parametrize(
    "instructions,warnings", [({"avx2": True}, 1), ({"avx512_bf16": True}, 0), ({"bf16": True}, 0)]
)
def test_bf16_on_a_cpu_without_its_instructions_is_warned_of_once(bert, monkeypatch, caplog, instructions, warnings):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: instructions)
    scoring_mode.warn_of_slow_bf16.cache_clear()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            bert.compute_score(["a", "b"], precision="bf16")
    assert sum("no bfloat16 instructions" in message for message in caplog.messages) == warnings
    scoring_mode.warn_of_slow_bf16.cache_clear()
