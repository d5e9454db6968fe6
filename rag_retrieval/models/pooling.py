"""From the states of a text's tokens to one vector: which tokens count, and how much.

    cls             h_0, the state of the first token
    mean            sum_i h_i / n
    weighted_mean   sum_i i h_i / sum_i i, i = 1 ... n (SGPT, https://arxiv.org/abs/2202.08904, equation 2)
    last            h_(n-1), found by the text's length, never by looking for padding

Every pooling but cls and last is a weight for each token, made on the host and equal for packed and padded batches; the
sum over a text's tokens is taken in float32.
"""

import numpy as np
import torch

from rag_retrieval.models.packing import on_device
from rag_retrieval.models.token_batch import TokenBatch, concatenated_ranges


def token_weights(pooling: str, batch: TokenBatch, include_prompt: bool = True) -> np.ndarray:
    """How much of each token's state is in its text's vector: [tokens], float32, 1 in sum for each text.

    include_prompt: whether the tokens before the text itself count; without them a text that has no others gets zeros.
    """
    places = concatenated_ranges(np.zeros_like(batch.lengths), batch.lengths)  # of each token in its text
    weights = np.ones(len(places), np.float64) if pooling == "mean" else places + 1.0
    if not include_prompt and batch.starts is not None:
        weights *= places >= np.repeat(batch.starts, batch.lengths)
    ends = np.cumsum(batch.lengths)
    sums = np.add.reduceat(weights, ends - batch.lengths)
    return (weights / np.repeat(np.maximum(sums, 1.0), batch.lengths)).astype(np.float32)


def weighted_sum_of_tokens(states: torch.Tensor, weights: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
    """The sum over each text's tokens of weight times state: [texts, hidden], float32.

    states: [tokens, hidden], text after text. weights: [tokens]. lengths: [texts], tokens.
    """
    device = states.device
    weighted = states.float() * on_device(weights, device, torch.float32)[:, None]
    return torch.segment_reduce(weighted, "sum", lengths=on_device(lengths, device), axis=0, unsafe=True)
