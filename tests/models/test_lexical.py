"""Lexical weights by a linear head and by SPLADE, against values by hand and against the whole tensor of logits."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForMaskedLM, ElectraConfig, ElectraForMaskedLM

from rag_retrieval.models import lexical
from rag_retrieval.models.lexical import check_logits, linear_weights, splade_weights
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.token_batch import TokenBatch, make_batch


def batch_of(*texts: list[int]) -> TokenBatch:
    return make_batch([EncodedPair(np.array(ids, np.int32), None, False, 0) for ids in texts])


def test_each_id_of_a_text_has_the_largest_weight_of_its_tokens():
    batch = batch_of([1, 9, 7, 9, 2], [1, 2], [1, 9, 2, 5])
    weights = torch.tensor([5.0, 0.2, 0.0, 0.6, 5.0, 5.0, 5.0, 5.0, 0.1, 5.0, 0.3], requires_grad=True)
    found = linear_weights(weights, batch, np.array([1, 2]))
    assert found.counts.tolist() == [2, 0, 2]
    assert found.ids.tolist() == [7, 9, 5, 9]  # ascending; a weight of 0 keeps its entry
    torch.testing.assert_close(found.weights, torch.tensor([0.0, 0.6, 0.3, 0.1]))
    (found.weights * torch.tensor([1.0, 10.0, 100.0, 1000.0])).sum().backward()
    assert weights.grad.tolist()[3] == 10 and weights.grad.tolist()[8:] == [1000, 0, 100]
    assert weights.grad.tolist()[:2] == [0, 0]  # of a special token, and of a smaller one


def whole_tensor(model, states: torch.Tensor, lengths: list[int]) -> torch.Tensor:
    """[texts, vocabulary], from all logits at once."""
    logits = model.get_output_embeddings()(lexical.output_states(model, states))
    return torch.stack([torch.log1p(torch.relu(text)).amax(0) for text in logits.split(lengths)])


@pytest.mark.parametrize("family", ["bert", "xlm_roberta"])
@pytest.mark.parametrize("tokens", [16, 10_000])  # at a time: texts go on from part to part, or one part holds them all
def test_splade_is_that_of_the_whole_tensor_with_its_gradients(base_folders, monkeypatch, family, tokens):
    model = AutoModelForMaskedLM.from_pretrained(base_folders[family])
    vocabulary = model.config.vocab_size
    monkeypatch.setattr(lexical, "LOGITS", tokens * vocabulary)
    monkeypatch.setattr(lexical, "GRADIENT_ENTRIES", 100)
    lengths = [5, 40, 1, 17]
    torch.manual_seed(0)
    states = torch.randn(sum(lengths), 32, requires_grad=True)
    found = splade_weights(model, states, np.array(lengths))
    expected = whole_tensor(model, states, lengths)
    assert found.counts.tolist() == (expected > 0).sum(1).tolist()
    rows, ids = torch.nonzero(expected, as_tuple=True)
    assert found.ids.equal(ids) and 0 < len(ids) < len(lengths) * vocabulary
    torch.testing.assert_close(found.weights, expected[rows, ids], atol=1e-5, rtol=1e-5)
    scale = torch.randn(len(ids))
    parameters = [states, *(p for name, p in model.named_parameters() if "embeddings" in name or "encoder" not in name)]
    of_found = torch.autograd.grad((found.weights * scale).sum(), parameters, allow_unused=True)
    of_expected = torch.autograd.grad((expected[rows, ids] * scale).sum(), parameters, allow_unused=True)
    assert sum(gradient is not None for gradient in of_expected) >= 5  # states, output layer, bias, transform
    for one, other in zip(of_found, of_expected, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_splade_is_float32_under_autocast(base_folders):
    model, states = AutoModelForMaskedLM.from_pretrained(base_folders["bert"]), torch.randn(9, 32)
    exact = splade_weights(model, states, np.array([4, 5]))
    with torch.autocast("cpu", torch.bfloat16):
        half = splade_weights(model, states, np.array([4, 5]))
    assert half.weights.dtype == exact.weights.dtype == torch.float32
    assert 0 < abs(half.weights.sum() / exact.weights.sum() - 1) < 0.02


def test_a_text_without_any_logit_above_0_has_no_entry(base_folders):
    model = AutoModelForMaskedLM.from_pretrained(base_folders["bert"])
    with torch.no_grad():
        model.get_output_embeddings().bias.fill_(-1e4)
    found = splade_weights(model, torch.randn(3, 32), np.array([1, 2]))
    assert found.counts.tolist() == [0, 0] and len(found.ids) == 0
    found.weights.sum().backward()


def test_a_head_that_is_not_known_is_refused():
    sizes = dict(hidden_size=32, embedding_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    model = ElectraForMaskedLM(ElectraConfig(vocab_size=50, **sizes))
    with pytest.raises(ValueError, match="here: .*ElectraForMaskedLM"):
        check_logits("here", model)


