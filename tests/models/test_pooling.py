"""Poolings against arithmetic by hand and loops over tokens."""

import math

import numpy as np
import pytest
import torch

from rag_retrieval.models.pooling import LatentAttention, Projection, token_weights, weighted_sum_of_tokens
from rag_retrieval.models.token_batch import TokenBatch


def batch(lengths: list[int], starts: list[int] | None = None) -> TokenBatch:
    lengths = np.array(lengths, np.int32)
    starts = None if starts is None else np.array(starts, np.int32)
    return TokenBatch(np.zeros(lengths.sum(), np.int32), None, lengths, np.zeros_like(lengths), starts)


def test_weights_of_the_mean_and_the_weighted_mean():
    assert token_weights("mean", batch([2, 1, 4])).tolist() == [0.5, 0.5, 1.0, 0.25, 0.25, 0.25, 0.25]
    expected = np.array([1 / 3, 2 / 3, 1, 0.1, 0.2, 0.3, 0.4], np.float32)
    np.testing.assert_allclose(token_weights("weighted_mean", batch([2, 1, 4])), expected)


def test_a_prompt_that_is_left_out_has_no_weight():
    weights = token_weights("mean", batch([4, 3, 2], [2, 0, 2]), include_prompt=False)
    np.testing.assert_allclose(weights, [0, 0, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 0, 0], rtol=1e-6)
    # weights keep their places in the whole text, as in sentence-transformers
    weights = token_weights("weighted_mean", batch([4], [2]), include_prompt=False)
    np.testing.assert_allclose(weights, [0, 0, 3 / 7, 4 / 7], rtol=1e-6)
    assert token_weights("mean", batch([4], [2])).tolist() == [0.25] * 4


def test_every_cls_of_a_long_text_has_equal_weight():
    # cls a b cls c d cls e sep: the sep at place 8 is none, nor is one at place 6 of a text that ends there
    weights = token_weights("cls", batch([9, 7, 2]), cls_interval=3, suffix=1)
    third, half = np.float32(1 / 3), 0.5
    assert weights.tolist() == [third, 0, 0, third, 0, 0, third, 0, 0, *[half, 0, 0, half, 0, 0, 0], 1, 0]


def test_the_sum_over_tokens_is_that_of_a_loop_and_so_is_its_gradient():
    generator = torch.Generator().manual_seed(0)
    lengths = np.array([3, 1, 5], np.int32)
    states = torch.randn(9, 4, generator=generator, requires_grad=True)
    weights = np.random.default_rng(0).random(9).astype(np.float32)
    sums = weighted_sum_of_tokens(states, weights, lengths)
    expected, place = torch.zeros(3, 4), 0
    for text, length in enumerate(lengths):
        for _ in range(length):
            expected[text] += weights[place] * states.detach()[place]
            place += 1
    torch.testing.assert_close(sums, expected)
    (sums * torch.arange(3.0)[:, None]).sum().backward()
    owner = np.repeat(np.arange(3.0), lengths)
    torch.testing.assert_close(states.grad, torch.from_numpy(weights * owner).float()[:, None].expand(9, 4))


def test_sums_are_taken_in_float32():
    states = torch.full((3000, 1), 1.0, dtype=torch.bfloat16)  # 256 + 1 is 256 in bfloat16
    sums = weighted_sum_of_tokens(states, np.ones(3000, np.float32), np.array([3000], np.int32))
    assert sums.dtype == torch.float32 and sums.item() == 3000


def layer_norm(state: torch.Tensor) -> torch.Tensor:
    centred = state - state.mean()
    return centred / torch.sqrt(centred.pow(2).mean() + 1e-5)


@torch.no_grad()
def test_latent_attention_is_that_of_a_loop_over_tokens_and_heads():
    torch.manual_seed(0)
    layer = LatentAttention(8, latents=5, heads=2)
    for parameter in layer.parameters():
        parameter.copy_(torch.randn_like(parameter))
    layer.query_norm.weight.fill_(1), layer.mlp_norm.weight.fill_(1)
    layer.query_norm.bias.zero_(), layer.mlp_norm.bias.zero_()
    states = torch.randn(3, 8)
    for state, given in zip(states, layer(states), strict=True):
        query = layer.query.weight @ layer_norm(state)
        attended = []
        for head in (slice(0, 4), slice(4, 8)):
            scores = [
                float(query[head] @ (layer.key.weight @ latent)[head]) / math.sqrt(4) for latent in layer.latents
            ]
            shares = [math.exp(score - max(scores)) for score in scores]
            attended.append(
                sum(
                    share / sum(shares) * (layer.value.weight @ latent)[head]
                    for share, latent in zip(shares, layer.latents, strict=True)
                )
            )
        expected = state + layer.output.weight @ torch.cat(attended)
        inner = layer.mlp[0].weight @ layer_norm(expected) + layer.mlp[0].bias
        gelu = torch.tensor([0.5 * value * (1 + math.erf(value / math.sqrt(2))) for value in inner.tolist()])
        expected = expected + layer.mlp[2].weight @ gelu + layer.mlp[2].bias
        torch.testing.assert_close(given, expected, atol=1e-4, rtol=1e-5)


def test_a_new_latent_attention_changes_nothing():
    states = torch.randn(3, 16)
    assert torch.equal(LatentAttention(16, latents=4)(states), states)


@pytest.mark.parametrize(
    ("name", "function"),
    [("linear.Identity", lambda x: x), ("activation.Tanh", math.tanh), ("activation.ReLU", lambda x: max(x, 0.0))],
)
def test_a_projection_is_computed_in_float32(name, function):
    projection = Projection(2, 1, activation=f"torch.nn.modules.{name}").to(torch.bfloat16)
    with torch.no_grad():
        projection.weight.copy_(torch.tensor([[2.0, -1.0]]))
        projection.bias.fill_(0.5)
    vector = projection(torch.tensor([[0.2501, 1.0]]))
    assert vector.dtype == torch.float32
    assert vector.item() == pytest.approx(function(2 * 0.2501 - 1.0 + 0.5), abs=1e-6)
