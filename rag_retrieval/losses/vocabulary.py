"""Losses over a whole vocabulary whose logits never exist at once: of masked tokens, and of a text's bag of words.

Logits are the output embedding's product with token states, x W^T + b. They are computed for a block of tokens at a
time, and the gradients at states, W and b with them, so that the backward pass computes no logits again. The largest
tensors are [tokens of a block, vocabulary] and the gradient of W.
"""

from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK_ELEMENTS = 1 << 24  # logits of a block: 64 MB in float32


def token_cross_entropy(states: Tensor, weight: Tensor, bias: Tensor | None, labels: Tensor) -> Tensor:
    """sum_i -log softmax(W x_i + b)[y_i], a float32 scalar; 0 without tokens.

    states: [tokens, width]. weight: [vocabulary, width]. bias: [vocabulary]. labels: int64 [tokens].
    """
    return _TokenCrossEntropy.apply(states, weight, bias, labels, torch.is_grad_enabled())


def bag_of_words_loss(
    states: Tensor, weight: Tensor, bias: Tensor | None, lengths: Sequence[int], words: Sequence[Tensor]
) -> Tensor:
    """sum over texts of the mean over w in words of -log softmax(m)[w], m = max over the text's tokens of W x_i + b.

    Xiao and Liu, "RetroMAE v2: Duplex Masked Auto-Encoder For Pre-Training Retrieval-Oriented Language Models" (2022,
    arXiv 2211.08769); a float32 scalar. states: [tokens, width], text after text. lengths: tokens of each text; one
    without tokens adds 0. words: for each text int64 [distinct token ids], at least one where it has tokens.
    """
    return _BagOfWords.apply(states, weight, bias, lengths, words, torch.is_grad_enabled())


def blocks(count: int, size: int) -> Iterator[slice]:
    return (slice(start, min(start + size, count)) for start in range(0, count, size))


class _Gradients:
    """Of a loss at states, weight and bias, as far as they are needed, collected while the loss is computed."""

    def __init__(self, ctx, states: Tensor, weight: Tensor, bias: Tensor | None, wanted: bool):
        needs = [wanted and each for each in ctx.needs_input_grad[:3]]
        self.parts = [
            torch.zeros_like(each) if need else None for each, need in zip((states, weight, bias), needs, strict=True)
        ]
        self.states, self.weight, self.bias = self.parts
        self.wanted = any(needs)
        ctx.gradients = self.parts

    @staticmethod
    def backward(ctx, factor: Tensor, others: int) -> tuple[Tensor | None, ...]:
        return *(None if each is None else each * factor for each in ctx.gradients), *(None,) * others


class _TokenCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, labels, wanted):
        gradients = _Gradients(ctx, states, weight, bias, wanted)
        loss = torch.zeros((), dtype=torch.float32, device=states.device)
        for rows in blocks(len(states), max(1, BLOCK_ELEMENTS // len(weight))):
            logits = F.linear(states[rows], weight, bias)  # half precision under autocast
            log_probabilities = logits.float().log_softmax(dim=1)
            own = labels[rows, None]
            loss -= log_probabilities.gather(1, own).sum()
            if not gradients.wanted:
                continue
            gradient = log_probabilities.exp_()
            gradient.scatter_add_(1, own, torch.full_like(gradient[:, :1], -1.0))
            gradient = gradient.to(logits.dtype)
            if gradients.states is not None:
                gradients.states[rows] = (gradient @ weight).to(states.dtype)
            if gradients.weight is not None:
                gradients.weight += gradient.T @ states[rows]
            if gradients.bias is not None:
                gradients.bias += gradient.sum(dim=0)
        return loss

    @staticmethod
    def backward(ctx, factor):
        return _Gradients.backward(ctx, factor, 2)


class _BagOfWords(torch.autograd.Function):
    @staticmethod
    def forward(ctx, states, weight, bias, lengths, words, wanted):
        gradients = _Gradients(ctx, states, weight, bias, wanted)
        loss = torch.zeros((), dtype=torch.float32, device=states.device)
        start = 0
        for length, own in zip(lengths, words, strict=True):
            if not length:
                continue
            largest, place = _largest_logits(states[start : start + length], weight, bias)
            log_probabilities = largest.log_softmax(dim=0)
            loss -= log_probabilities[own].mean()
            if gradients.wanted:
                gradient = log_probabilities.exp_()
                gradient[own] -= 1 / len(own)
                _add_at_largest(gradients, gradient, start + place, states, weight)
            start += length
        return loss

    @staticmethod
    def backward(ctx, factor):
        return _Gradients.backward(ctx, factor, 3)


def _largest_logits(states: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """The largest logit of each word over a text's tokens, float32 [vocabulary], and of which token it is, int64."""
    largest = place = None
    for rows in blocks(len(states), max(1, BLOCK_ELEMENTS // len(weight))):
        values, places = F.linear(states[rows], weight, bias).float().max(dim=0)
        if largest is None:
            largest, place = values, places
            continue
        better = values > largest
        largest, place = torch.where(better, values, largest), torch.where(better, places + rows.start, place)
    return largest, place


def _add_at_largest(gradients: _Gradients, gradient: Tensor, place: Tensor, states: Tensor, weight: Tensor) -> None:
    """gradient: of the loss at the largest logits, [vocabulary]. place: rows of `states` that these are of."""
    for words in blocks(len(weight), max(1, BLOCK_ELEMENTS // weight.shape[1])):
        slope = gradient[words, None]
        if gradients.states is not None:
            gradients.states.index_add_(0, place[words], (slope * weight[words]).to(states.dtype))
        if gradients.weight is not None:
            gradients.weight[words] += slope * states[place[words]]
    if gradients.bias is not None:
        gradients.bias += gradient
