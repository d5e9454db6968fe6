"""Losses over a vocabulary in blocks: values by hand, gradients against autograd over all logits at once."""

import math

import pytest
import torch
import torch.nn.functional as F

from rag_retrieval.losses import vocabulary
from rag_retrieval.losses.vocabulary import bag_of_words_loss, token_cross_entropy

TOKENS, WIDTH, WORDS = 11, 5, 23


@pytest.fixture
def inputs():
    """States of 11 tokens, an output embedding of 23 words and its bias, in float64."""
    generator = torch.Generator().manual_seed(0)
    shapes = ((TOKENS, WIDTH), (WORDS, WIDTH), (WORDS,))
    return [torch.randn(shape, generator=generator, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.fixture(params=["one block", "blocks of two tokens"])
def block(request, monkeypatch):
    if request.param != "one block":
        monkeypatch.setattr(vocabulary, "BLOCK_ELEMENTS", 2 * WORDS)


def gradients(loss, inputs) -> list[torch.Tensor]:
    return torch.autograd.grad(3 * loss, inputs)


def plain_bag_of_words(states, weight, bias, lengths, words):
    terms = []
    for text, own in zip(states.split(lengths), words, strict=True):
        if len(text):
            largest = (text @ weight.T + bias).amax(dim=0)
            terms.append(-torch.stack([largest.log_softmax(dim=0)[word] for word in own.tolist()]).mean())
    return sum(terms)


def test_values_by_hand():
    """Two words with logits 0 and log 3 for the one token, and log 7 and 0 for the other."""
    states = torch.tensor([[0.0, math.log(3)], [math.log(7), 0.0]])
    loss = token_cross_entropy(states, torch.eye(2), None, torch.tensor([1, 1]))
    assert loss.item() == pytest.approx(math.log(4 / 3) + math.log(8))
    # together the largest logits are log 7 and log 3
    bag = [bag_of_words_loss(states, torch.eye(2), None, [2], [torch.tensor(words)]) for words in ([0], [0, 1])]
    assert bag[0].item() == pytest.approx(math.log(10 / 7))
    assert bag[1].item() == pytest.approx((math.log(10 / 7) + math.log(10 / 3)) / 2)


def test_cross_entropy_has_the_value_and_gradients_of_all_logits_at_once(inputs, block):
    labels = torch.arange(TOKENS) * 2
    found, expected = token_cross_entropy(*inputs, labels), F.cross_entropy(F.linear(*inputs), labels, reduction="sum")
    assert found.item() == pytest.approx(expected.item(), rel=1e-6) and found.dtype == torch.float32
    for one, other in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_bag_of_words_has_the_value_and_gradients_of_all_logits_at_once(inputs, block):
    lengths, words = [5, 0, 6], [torch.tensor([3, 9, 22]), torch.tensor([], dtype=torch.int64), torch.tensor([0])]
    found, expected = (of(*inputs, lengths, words) for of in (bag_of_words_loss, plain_bag_of_words))
    assert found.item() == pytest.approx(expected.item(), rel=1e-6)
    for one, other in zip(gradients(found, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def test_without_tokens_the_loss_is_zero_and_every_gradient_too(inputs):
    states, weight, bias = inputs
    none, labels = states[:0], torch.empty(0, dtype=torch.int64)
    for loss in (token_cross_entropy(none, weight, bias, labels), bag_of_words_loss(none, weight, bias, [0], [labels])):
        assert loss.item() == 0
        assert all(not gradient.any() for gradient in torch.autograd.grad(loss, [weight, bias]))


def test_frozen_weights_and_passes_without_a_graph_cost_no_gradients(inputs):
    states, weight, bias = inputs
    labels = torch.zeros(TOKENS, dtype=torch.int64)
    loss = token_cross_entropy(states, weight.detach(), None, labels)
    assert [each is not None for each in loss.grad_fn.gradients] == [True, False, False]
    (found,) = torch.autograd.grad(loss, states)
    expected = F.cross_entropy(states @ weight.detach().T, labels, reduction="sum")
    torch.testing.assert_close(found, *torch.autograd.grad(expected, states), rtol=1e-5, atol=1e-6)
    with torch.no_grad():
        assert not token_cross_entropy(states, weight, bias, labels).requires_grad


def test_under_autocast_the_loss_is_float32_and_near(inputs):
    states, weight, bias = (each.detach().float().requires_grad_() for each in inputs)
    labels = torch.arange(TOKENS)
    with torch.autocast("cpu", torch.bfloat16):
        found = token_cross_entropy(states, weight, bias, labels)
    expected = F.cross_entropy(F.linear(states, weight, bias), labels, reduction="sum")
    assert found.dtype == torch.float32 and found.item() == pytest.approx(expected.item(), rel=2e-2)
    for one, other in zip(gradients(found, [states, weight]), gradients(expected, [states, weight]), strict=True):
        torch.testing.assert_close(one, other, rtol=0.1, atol=0.1)
