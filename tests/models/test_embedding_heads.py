"""Latent attention and projections against loops and arithmetic by hand."""

import math

import pytest
import torch

from rag_retrieval.models.embedding_heads import LatentAttention, Projection


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


def test_a_residual_is_added_after_the_activation():
    wider, same = (Projection(2, size, activation="torch.nn.modules.activation.ReLU", has_residual=True)
                   for size in (1, 2))  # fmt: skip
    with torch.no_grad():
        wider.weight.copy_(torch.tensor([[-2.0, 1.0]])), wider.bias.zero_()
        wider.residual.weight.copy_(torch.tensor([[3.0, 5.0]]))
        same.weight.copy_(torch.eye(2)), same.bias.copy_(torch.tensor([-4.0, 1.0]))
    assert wider(torch.tensor([[1.0, 10.0]])).tolist() == [[8.0 + 53.0]]
    assert same(torch.tensor([[1.0, 10.0]])).tolist() == [[0.0 + 1.0, 11.0 + 10.0]]
