"""RetroMAE's decoder: its mask, its formula against one written out token by token, and what cannot leak."""

import math

import numpy as np
import pytest
import torch
from torch.nn.functional import gelu
from transformers import BertConfig

from rag_retrieval.models.masked_decoder import MaskedDecoder, visible_tokens

WIDTH, HEADS, SUFFIX = 8, 2, 1
LENGTHS = np.array([5, 2, 7], np.int32)  # the second text has nothing between its special tokens
SEEDS = np.array([3, 4, 5])


@pytest.fixture(scope="module")
def decoder():
    torch.manual_seed(0)
    decoder = MaskedDecoder(BertConfig(hidden_size=WIDTH, num_attention_heads=HEADS), positions=10)
    for parameter in decoder.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return decoder


@pytest.fixture
def inputs():
    generator = torch.Generator().manual_seed(1)
    return (torch.randn(count, WIDTH, generator=generator) for count in (len(LENGTHS), LENGTHS.sum()))


def test_a_position_sees_the_vector_always_itself_never_and_others_by_chance():
    visible = visible_tokens(400, 402, 7, 0.3, torch.device("cpu"))
    own = torch.zeros_like(visible)
    own[torch.arange(400), torch.arange(400) + 1] = True
    assert visible[:, 0].all() and not visible[own].any()
    others = visible[:, 1:][~own[:, 1:]].float()
    assert others.mean().item() == pytest.approx(0.7, abs=0.01)  # 160,000 draws: a standard deviation of .0012
    assert len(visible.unique(dim=0)) == 400, "each position has its own mask"
    assert torch.equal(visible, visible_tokens(400, 402, 7, 0.3, torch.device("cpu")))
    assert not torch.equal(visible, visible_tokens(400, 402, 8, 0.3, torch.device("cpu")))


def plain(decoder, sentences, embeddings, masked):
    """One query token, one head and one visible token at a time."""
    states, starts = [], np.cumsum(LENGTHS) - LENGTHS
    for text, (start, length, seed) in enumerate(zip(starts, LENGTHS, SEEDS, strict=True)):
        h, p = sentences[text], decoder.positions.weight
        context = [h] + [decoder.embedding_norm(embeddings[start + j] + p[j]) for j in range(1, length)]
        visible = visible_tokens(length - 2, length, int(seed), masked, torch.device("cpu"))
        for i in range(1, length - SUFFIX):
            query, heads = decoder.query(h + p[i]), []
            seen = [context[j] for j in range(length) if visible[i - 1, j]]
            for part in torch.arange(WIDTH).split(WIDTH // HEADS):
                logits = torch.stack([query[part] @ decoder.key(each)[part] for each in seen])
                logits = logits / math.sqrt(WIDTH / HEADS)
                values = torch.stack([decoder.value(each)[part] for each in seen])
                heads.append(logits.softmax(0) @ values)
            state = decoder.attention_norm(h + p[i] + decoder.attended(torch.cat(heads)))
            states.append(decoder.output_norm(state + decoder.outer(gelu(decoder.inner(state)))))
    return torch.stack(states)


@pytest.mark.parametrize("masked", [0.0, 0.5])
def test_states_and_gradients_are_those_of_the_formula_written_out(decoder, inputs, masked):
    sentences, embeddings = (each.requires_grad_() for each in inputs)
    found = decoder(sentences, embeddings, LENGTHS, SEEDS, masked, SUFFIX)
    expected = plain(decoder, sentences, embeddings, masked)
    assert found.shape == (3 + 0 + 5, WIDTH)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    wanted = [sentences, embeddings, *decoder.parameters()]
    weights = torch.randn(found.shape, generator=torch.Generator().manual_seed(2))
    pairs = zip(*(torch.autograd.grad((of * weights).sum(), wanted) for of in (found, expected)), strict=True)
    for one, other in pairs:
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)


def test_a_token_never_sees_itself_and_all_masked_leaves_the_vector_alone(decoder, inputs):
    sentences, embeddings = (each.requires_grad_() for each in inputs)
    states = decoder(sentences, embeddings, LENGTHS, SEEDS, 0.0, SUFFIX)
    for row, token in ((0, 1), (2, 3), (3, 8), (7, 12)):
        (gradient,) = torch.autograd.grad(states[row].square().sum(), embeddings, retain_graph=True)
        seen = gradient.abs().sum(dim=1) > 0
        first = 0 if row < 3 else 7
        assert not seen[token] and not seen[first] and seen.sum() == (3 if row < 3 else 5), "all others of its text"
    alone = decoder(sentences, embeddings, LENGTHS, SEEDS, 1.0, SUFFIX)
    (gradient,) = torch.autograd.grad(alone.square().sum(), embeddings)
    assert not gradient.any()


def test_a_text_s_states_do_not_depend_on_its_batch(decoder, inputs):
    sentences, embeddings = inputs
    together = decoder(sentences, embeddings, LENGTHS, SEEDS, 0.5, SUFFIX)
    alone = decoder(sentences[2:], embeddings[7:], LENGTHS[2:], SEEDS[2:], 0.5, SUFFIX)
    torch.testing.assert_close(together[3:], alone, rtol=1e-5, atol=1e-6)
