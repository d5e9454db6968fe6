"""The decoder of RetroMAE's pre-training: one layer that rebuilds a text from its vector and a part of its tokens.

Xiao et al., "RetroMAE: Pre-Training Retrieval-oriented Language Models Via Masked Auto-Encoder" (2022, arXiv
2205.12035), "enhanced decoding":

    H1 = [h + p_1, ..., h + p_N]                   queries: the text's vector h with the embedding of a position
    H2 = [h, e_1 + p_1, ..., e_N + p_N]            context: the vector, and the embeddings of the unmasked tokens
    A  = softmax(Q(H1) K(H2)^T / sqrt(d) + M) V(H2)

M_ij is 0 where position i may look at j, else -inf. Each position has a row of its own: h always, itself never, and
each other token with the probability 1 - masked. So every token of a text is predicted, and from little more than h.
"""

import numpy as np
import torch
from torch import nn
from torch.nn.functional import gelu, scaled_dot_product_attention
from transformers import PreTrainedConfig

from rag_retrieval.models.packing import on_device
from rag_retrieval.models.token_batch import concatenated_ranges


class MaskedDecoder(nn.Module):
    """config: of the encoder, whose width and number of heads it has. positions: tokens of a text at most.

    Position embeddings are its own, since some families have none; those of tokens are given. As in BERT, what each
    half of the layer gives is added to what it took, then normalized. There is no dropout.
    """

    def __init__(self, config: PreTrainedConfig, positions: int):
        super().__init__()
        width, self.heads = config.hidden_size, config.num_attention_heads
        self.positions = nn.Embedding(positions, width)
        self.query, self.key, self.value, self.attended = (nn.Linear(width, width) for _ in range(4))
        self.inner, self.outer = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.embedding_norm, self.attention_norm, self.output_norm = (nn.LayerNorm(width) for _ in range(3))
        for name, parameter in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(parameter)
            elif parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.02)

    def forward(
        self,
        sentences: torch.Tensor,
        embeddings: torch.Tensor,
        lengths: np.ndarray,
        seeds: np.ndarray,
        masked: float,
        suffix: int,
    ) -> torch.Tensor:
        """States from which a text's own tokens are predicted, all but its first and its last `suffix` ones:
        [own tokens of all texts, width].

        sentences: [texts, width], h. embeddings: [tokens, width] of the unmasked tokens, text after text. lengths:
        int32 [texts], tokens, at least 1 + suffix. seeds: int64 [texts], of M. masked: in [0, 1], the probability that
        a position may not look at a token.
        """
        device, first, own = embeddings.device, np.cumsum(lengths, dtype=np.int32) - lengths, lengths - 1 - suffix
        texts = np.repeat(np.arange(len(lengths)), own)
        places = self.positions(on_device(concatenated_ranges(np.zeros_like(lengths), lengths), device))
        context = self.embedding_norm(embeddings + places)
        context = context.index_copy(0, on_device(first, device), sentences.to(context.dtype))
        queries = sentences[on_device(texts, device)] + places[on_device(concatenated_ranges(first + 1, own), device)]
        query, key, value = (
            project(states).unflatten(-1, (self.heads, -1)).transpose(0, 1)  # [heads, tokens, size]
            for project, states in ((self.query, queries), (self.key, context), (self.value, context))
        )
        parts = [
            scaled_dot_product_attention(*of_text, attn_mask=visible_tokens(count, length, seed, masked, device))
            for *of_text, count, length, seed in zip(
                query.split(own.tolist(), dim=1),
                key.split(lengths.tolist(), dim=1),
                value.split(lengths.tolist(), dim=1),
                own.tolist(), lengths.tolist(), seeds.tolist(), strict=True,
            )
        ]  # fmt: skip
        attended = torch.cat(parts, dim=1).transpose(0, 1).flatten(1)
        states = self.attention_norm(queries + self.attended(attended))
        return self.output_norm(states + self.outer(gelu(self.inner(states))))


def visible_tokens(own: int, length: int, seed: int, masked: float, device: torch.device) -> torch.Tensor:
    """Which of a text's tokens each of its own ones may look at: bool [own, length]; a seed gives the same again."""
    generator = torch.Generator(device).manual_seed(seed)
    visible = torch.rand(own, length, generator=generator, device=device) >= masked
    visible[:, 0] = True
    visible.diagonal(1).fill_(False)  # the first of its own tokens is its second one
    return visible
