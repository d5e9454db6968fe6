"""From the states of a text's tokens to one vector: which tokens count, and how much.

    cls               h_0, the state of the first token; with MCLS the mean of those of the first token and its copies
    mean              sum_i h_i / n
    weighted_mean     sum_i i h_i / sum_i i, i = 1 ... n (SGPT, https://arxiv.org/abs/2202.08904, equation 2)
    last              h_(n-1), found by the text's length, never by looking for padding
    latent_attention  the mean of what `LatentAttention` makes of each h_i

Every pooling but that of one token is a weight for each token, made on the host and equal for packed and padded
batches; the sum over a text's tokens is taken in float32.
"""

from typing import Any

import numpy as np
import torch
from torch import nn

from rag_retrieval.models.packing import on_device
from rag_retrieval.models.token_batch import TokenBatch, concatenated_ranges

IDENTITY = "torch.nn.modules.linear.Identity"
ACTIVATIONS = {
    IDENTITY: nn.Identity,
    "torch.nn.modules.activation.Tanh": nn.Tanh,
    "torch.nn.modules.activation.ReLU": nn.ReLU,
    "torch.nn.modules.activation.GELU": nn.GELU,
    "torch.nn.modules.activation.Sigmoid": nn.Sigmoid,
}


def token_weights(
    pooling: str, batch: TokenBatch, include_prompt: bool = True, cls_interval: int | None = None, suffix: int = 0
) -> np.ndarray:
    """How much of each token's state is in its text's vector: [tokens], float32, 1 in sum for each text.

    include_prompt: whether the tokens before the text itself count; without them a text that has no others gets zeros.
    cls_interval: of MCLS, tokens from one cls to the next; suffix: tokens after a text, which are no cls.
    """
    places = concatenated_ranges(np.zeros_like(batch.lengths), batch.lengths)  # of each token in its text
    if cls_interval is not None:
        inside = places < np.repeat(np.maximum(batch.lengths - suffix, 1), batch.lengths)
        weights = (inside & (places % cls_interval == 0)).astype(np.float64)
    else:
        weights = places + 1.0 if pooling == "weighted_mean" else np.ones(len(places))
    if not include_prompt and batch.starts is not None:
        weights *= places >= np.repeat(batch.starts, batch.lengths)
    sums = np.add.reduceat(weights, np.cumsum(batch.lengths) - batch.lengths)
    return (weights / np.repeat(np.maximum(sums, 1.0), batch.lengths)).astype(np.float32)


def weighted_sum_of_tokens(states: torch.Tensor, weights: np.ndarray, lengths: np.ndarray) -> torch.Tensor:
    """The sum over each text's tokens of weight times state: [texts, hidden], float32.

    states: [tokens, hidden], text after text. weights: [tokens]. lengths: [texts], tokens.
    """
    device = states.device
    weighted = states.float() * on_device(weights, device, torch.float32)[:, None]
    return torch.segment_reduce(weighted, "sum", lengths=on_device(lengths, device), axis=0, unsafe=True)


class LatentAttention(nn.Module):
    """Each token's state attends to trained latent vectors, whatever the other tokens are (NV-Embed,
    https://arxiv.org/abs/2405.17428, section 3.1, with the residual connections and norms of its published weights):

        x = h + O softmax(Q K^T / sqrt(d)) V,   Q = norm(h) W_q,  K = L W_k,  V = L W_v  (heads of width d)
        y = x + W_2 gelu(W_1 norm(x))

    O and W_2 begin as zeros, so that a new one changes nothing.
    """

    saved_as, name_prefix = "LatentAttention", ""  # name_prefix: of the names in the file of its weights

    def __init__(self, hidden_size: int, latents: int = 512, heads: int = 8):
        super().__init__()
        self.heads = heads
        self.latents = nn.Parameter(torch.randn(latents, hidden_size) / hidden_size**0.5)
        self.query_norm, self.mlp_norm = nn.LayerNorm(hidden_size), nn.LayerNorm(hidden_size)
        self.query, self.key, self.value, self.output = (
            nn.Linear(hidden_size, hidden_size, bias=False) for _ in range(4)
        )
        self.mlp = nn.Sequential(
            nn.Linear(hidden_size, 4 * hidden_size), nn.GELU(), nn.Linear(4 * hidden_size, hidden_size)
        )
        for new in (self.output.weight, self.mlp[2].weight, self.mlp[2].bias):
            nn.init.zeros_(new)

    @classmethod
    def of_values(cls, values: dict[str, Any]) -> "LatentAttention":
        return cls(values["hidden_size"], values["latents"], values["heads"])

    def saved_values(self) -> dict[str, Any]:
        latents, hidden_size = self.latents.shape
        return {"hidden_size": hidden_size, "latents": latents, "heads": self.heads}

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        """states: [tokens, hidden]. Returns the same shape, float32."""
        states = states.float()
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(0, 1)[None]  # [1, heads, tokens or latents, size]
            for projected in (self.query(self.query_norm(states)), self.key(self.latents), self.value(self.latents))
        )
        attended = nn.functional.scaled_dot_product_attention(query, key, value)
        states = states + self.output(attended[0].transpose(0, 1).flatten(1))
        return (states + self.mlp(self.mlp_norm(states))).float()


class Projection(nn.Linear):
    """activation(W x + b), in float32 whatever the dtype of the weights: a Dense module of sentence-transformers.

    activation: the name of torch's class.
    """

    saved_as, name_prefix = "Dense", "linear."

    def __init__(self, in_features: int, out_features: int, bias: bool = True, activation: str = IDENTITY):
        super().__init__(in_features, out_features, bias)
        self.activation = activation
        self.function = ACTIVATIONS[activation]()

    @classmethod
    def of_values(cls, values: dict[str, Any]) -> "Projection":
        activation = values.get("activation_function", "torch.nn.modules.activation.Tanh")
        if activation not in ACTIVATIONS:
            raise ValueError(f"activation_function {activation}; known are {', '.join(ACTIVATIONS)}")
        return cls(values["in_features"], values["out_features"], values.get("bias", True), activation)

    def saved_values(self) -> dict[str, Any]:
        sizes = {"in_features": self.in_features, "out_features": self.out_features, "bias": self.bias is not None}
        return sizes | {"activation_function": self.activation}

    def forward(self, vectors: torch.Tensor) -> torch.Tensor:
        bias = None if self.bias is None else self.bias.float()
        return self.function(nn.functional.linear(vectors.float(), self.weight.float(), bias))
