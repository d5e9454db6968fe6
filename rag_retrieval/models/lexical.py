"""Lexical weights: how much each token id counts for a text, in two ways.

    linear   w_t = relu(W h_i + b) for each token of the text, the largest for each of its ids (BGE-M3,
             https://arxiv.org/abs/2402.03216, section 3.1). Special and unknown tokens are left out.
    splade   w_j = max over tokens i of log(1 + relu(z_ij)), z the logits of the language model over its vocabulary
             (SPLADE, https://arxiv.org/abs/2109.10086, equation 6). Entries are those above 0.
"""

import numpy as np
import torch
from torch.nn.functional import linear
from transformers import PreTrainedModel

from rag_retrieval.models.kept_tokens import lexical_entries
from rag_retrieval.models.mlm_head import HEADS, head_states
from rag_retrieval.models.packing import on_device
from rag_retrieval.models.representations import Lexical
from rag_retrieval.models.scoring import evaluating
from rag_retrieval.models.token_batch import LOGITS, TokenBatch

GRADIENT_ENTRIES = 2**16  # whose rows of the output layer are held at once


def linear_weights(token_weights: torch.Tensor, batch: TokenBatch, left_out: np.ndarray) -> Lexical:
    """token_weights: [tokens], float32, at least 0. left_out: ids without an entry.

    A text's entries are its distinct ids, known before the forward; a weight of 0 keeps its entry.
    """
    entries, device = lexical_entries(batch, left_out), token_weights.device
    ids, counts, tokens, entry_of_token = (on_device(values, device) for values in entries)
    weights = token_weights.new_zeros(len(ids)).scatter_reduce(0, entry_of_token, token_weights[tokens], "amax")
    return Lexical(ids, weights, counts)


# ---- splade ---------------------------------------------------------------------------------------------


def splade_weights(model: PreTrainedModel, states: torch.Tensor, lengths: np.ndarray) -> Lexical:
    """model: with its language modelling head. states: [tokens, hidden], of its last layer, text after text. lengths:
    [texts], tokens.

    log(1 + relu(z)) grows with z, so that the largest logit is taken first. Logits are computed for some tokens at a
    time, and the backward pass goes through the entries alone: nothing of the size tokens times vocabulary is kept.
    """
    output = model.get_output_embeddings()
    states = output_states(model, states)
    logits, ids, counts = LargestLogits.apply(states, output.weight, output.bias, lengths.tolist())
    return Lexical(ids, logits.log1p(), counts)


class LargestLogits(torch.autograd.Function):
    """The largest logit of each vocabulary entry over a text's tokens, where it is above 0."""

    @staticmethod
    def forward(ctx, states, weight, bias, lengths):
        """states: [tokens, hidden]. weight: [vocabulary, hidden]. bias: [vocabulary] or None. Returns the logits,
        float32 [entries], and without gradient their ids, int64 [entries], and the entries of each text."""
        device = states.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else weight.dtype
        with torch.autocast(device.type, enabled=False):
            found = largest_logits(
                states.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype), lengths
            )
        logits, ids, tokens, counts = found
        ctx.save_for_backward(states, weight, ids, tokens)
        ctx.has_bias = bias is not None
        ctx.mark_non_differentiable(ids, counts)
        return logits, ids, counts

    @staticmethod
    def backward(ctx, gradient, *_):
        states, weight, ids, tokens = ctx.saved_tensors
        of_states = torch.zeros_like(states, dtype=torch.float32)
        of_weight = torch.zeros_like(weight, dtype=torch.float32) if ctx.needs_input_grad[1] else None
        for part in torch.arange(len(ids), device=ids.device).split(GRADIENT_ENTRIES):
            own, token, scale = ids[part], tokens[part], gradient[part, None]
            of_states.index_add_(0, token, weight[own].float() * scale)
            if of_weight is not None:
                of_weight.index_add_(0, own, states[token].float() * scale)
        of_bias = None
        if ctx.has_bias:
            of_bias = gradient.new_zeros(len(weight)).index_add_(0, ids, gradient).to(weight.dtype)
        return of_states.to(states.dtype), None if of_weight is None else of_weight.to(weight.dtype), of_bias, None


def largest_logits(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, lengths: list[int]
) -> tuple[torch.Tensor, ...]:
    """Of the entries above 0, text after text: logits, float32; ids; the tokens, in `states`, that have them; and the
    entries of each text."""
    size = max(16, LOGITS // len(weight))  # tokens at a time
    ends = np.cumsum(lengths).tolist()
    parts, text, begun = [], 0, None  # begun: logits and tokens of a text that goes on in the next part
    for start in range(0, len(states), size):
        logits = linear(states[start : start + size], weight, bias)
        stop, finished = start + len(logits), []
        first = start
        while first < stop:
            last = min(ends[text], stop)
            largest, token = logits[first - start : last - start].max(dim=0)
            token += first
            if begun is not None:
                token = torch.where(largest > begun[0], token, begun[1])
                largest = torch.maximum(largest, begun[0])
            begun = largest, token
            if last == ends[text]:
                finished.append(begun)
                text, begun = text + 1, None
            first = last
        if finished:
            largest, token = map(torch.stack, zip(*finished, strict=True))
            rows, ids = torch.nonzero(largest > 0, as_tuple=True)
            counts = torch.bincount(rows, minlength=len(finished))
            parts.append((largest[rows, ids].float(), ids, token[rows, ids], counts))
    logits, ids, tokens, counts = map(torch.cat, zip(*parts, strict=True))
    return logits, ids, tokens, counts


def output_states(model: PreTrainedModel, states: torch.Tensor) -> torch.Tensor:
    """What the output layer takes for states of the last layer, [tokens, hidden]: in a decoder these themselves."""
    return head_states(model, states) if model.config.model_type in HEADS else states


def check_logits(path: str, model: PreTrainedModel) -> None:
    """Raises ValueError for a family whose logits are not those of its output layer of `output_states`.

    Logits that are not finite are not compared: who opens the model refuses weights that are no numbers by their name.
    """
    ids = torch.tensor([[5, 6, 7, 8]])
    with evaluating(model):
        mask = torch.ones_like(ids)
        expected = model(input_ids=ids, attention_mask=mask).logits.float()
        states = model.base_model(input_ids=ids, attention_mask=mask).last_hidden_state
        output = model.get_output_embeddings()
        states = output_states(model, states)
        fits = states.shape[-1] == output.in_features
        found = output(states).float() if fits else torch.zeros_like(expected)
    if not expected.isfinite().all():
        return
    tolerance = 1e-4 if model.dtype == torch.float32 else 3e-2
    if not (found - expected).abs().max() <= tolerance * max(1.0, expected.abs().max().item()):
        raise ValueError(
            f"{path}: the language modelling head of a {type(model).__name__} is not known here; for lexical weights "
            "give lexical linear, or a model of another family"
        )
