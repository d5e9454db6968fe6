import pytest
import torch
from tiny_models import tiny_llama, tiny_qwen2, tiny_xlm_roberta
from torch import nn
from transformers import AutoModel

from rag_retrieval.train.optim import make_adamw, parameter_groups, without_decay


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
def test_a_family_has_no_decay_on_its_norms_and_decay_on_embeddings_and_matrices(family, tmp_path):
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
