"""From the states of a text's tokens to one vector: which tokens count, and how much.

    cls               h_0, the state of the first token; with MCLS the mean of those of the first token and its copies
    mean              sum_i h_i / n
    weighted_mean     sum_i i h_i / sum_i i, i = 1 ... n (SGPT, https://arxiv.org/abs/2202.08904, equation 2)
    last              h_(n-1), found by the text's length, never by looking for padding
    latent_attention  the mean of what `LatentAttention` makes of each h_i

Every pooling but that of one token is a weight for each token, made on the host and equal for packed and padded
batches; the sum over a text's tokens is taken in float32.
"""

import numpy as np
import torch

from rag_retrieval.models.kept_tokens import Numbers, is_cls_copy, places_in_texts
from rag_retrieval.models.packing import on_device
from rag_retrieval.models.token_batch import TokenBatch


def token_weights(
    pooling: str, batch: TokenBatch, include_prompt: bool = True, cls_interval: int | None = None, suffix: int = 0
) -> np.ndarray:
    """How much of each token's state is in its text's vector: [tokens], float32, 1 in sum for each text.

    include_prompt: whether the tokens before the text itself count; without them a text that has no others gets zeros.
    cls_interval: of MCLS, tokens from one cls to the next; suffix: tokens after a text, which are no cls.
    """
    places = places_in_texts(batch)
    lengths, starts = (np.repeat(values, batch.lengths) for values in (batch.lengths, batch.starts))
    starts = None if include_prompt else starts
    weights = unscaled_weights(pooling, places, lengths, starts, cls_interval, suffix).astype(np.float64)
    sums = np.add.reduceat(weights, np.cumsum(batch.lengths) - batch.lengths)
    return (weights / np.repeat(np.maximum(sums, 1.0), batch.lengths)).astype(np.float32)


def unscaled_weights(
    pooling: str,
    places: Numbers,
    lengths: Numbers,
    starts: Numbers | None,
    cls_interval: int | None,
    suffix: int,
) -> Numbers:
    """The weights before they are divided by their sum, of arrays or tensors, whole numbers or bool.

    places: of each token in its text; lengths: of its text; starts: tokens that do not count at the beginning of its
    text, None where all do.
    """
    if cls_interval is not None:
        weights = (places == 0) | is_cls_copy(places, lengths, cls_interval, suffix)
    else:
        weights = places + 1 if pooling == "weighted_mean" else places >= 0
    return weights if starts is None else weights * (places >= starts)


def packed_sums(states: torch.Tensor, weights: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
    """The sum over each text's tokens of weight times state: [texts, hidden], float32.

    states: [tokens, hidden], text after text. weights: [tokens]. lengths: [texts], tokens.
    """
    device = states.device
    weighted = states.float() * on_device(weights, device, torch.float32)[:, None]
    return torch.segment_reduce(weighted, "sum", lengths=on_device(lengths, device), axis=0, unsafe=True)
