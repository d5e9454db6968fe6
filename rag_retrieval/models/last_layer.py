"""The last transformer layer, computed for the one token of each pair that the head reads.

Every token's key and value are needed there, but no other token's query, output and feed-forward: five sixths of an
encoder layer's products fall away, 14 percent of a six-layer model, and no score changes.

What a reader would get wrong: the layer then gives one vector for each pair, not for each token. Only packed batches
take this way; for all others the layer is as the family made it. Gradient checkpointing does
not recompute it (newer transformers wrap the family's `forward`), and need not: the backward begins with it.
"""

from functools import partial

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rag_retrieval.models.packed_attention import packed_attention
from rag_retrieval.models.packing import Packing

LIKE_BERT = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
LIKE_LLAMA = ("llama", "qwen2", "qwen3", "mistral", "gemma")


def read_at_last_layer(model: PreTrainedModel) -> None:
    """Let the last layer compute one vector for each pair of a packed batch, in the families known here."""
    if model.config.model_type in LIKE_BERT:
        layer, forward = model.base_model.encoder.layer[-1], read_like_bert
    elif model.config.model_type in LIKE_LLAMA:
        layer, forward = model.base_model.layers[-1], read_like_llama
    else:
        return
    layer.forward = partial(forward, layer)  # a partial can be pickled, for processes on other devices


def read_like_bert(layer: nn.Module, hidden: torch.Tensor, *arguments, packing: Packing | None = None, **options):
    """hidden: [1, tokens, hidden]. Returns [1, pairs, hidden]."""
    if packing is None:
        return type(layer).forward(layer, hidden, *arguments, **options)
    attention = layer.attention.self
    read = hidden[:, packing.read]
    query, key, value = (
        by_head(project(states), attention.attention_head_size)
        for project, states in ((attention.query, read), (attention.key, hidden), (attention.value, hidden))
    )
    found, _ = packed_attention(attention, query, key, value, None, packing.reading, scaling=attention.scaling)
    return layer.feed_forward_chunk(layer.attention.output(found.flatten(2), read))


def read_like_llama(layer: nn.Module, hidden: torch.Tensor, *arguments, packing: Packing | None = None, **options):
    """hidden: [1, tokens, hidden]. Returns [1, pairs, hidden]."""
    if packing is None:
        return type(layer).forward(layer, hidden, *arguments, **options)
    attention = layer.self_attn
    states, read = layer.input_layernorm(hidden), hidden[:, packing.read]
    query, key, value = (
        by_head(project(states), attention.head_dim)
        for project, states in (
            (attention.q_proj, states[:, packing.read]),
            (attention.k_proj, states),
            (attention.v_proj, states),
        )
    )
    family = attention.config.model_type
    if family == "qwen3":
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = options["position_embeddings"]
    query, _ = apply_rotary_pos_emb(query, query, cos[:, packing.read], sin[:, packing.read])
    _, key = apply_rotary_pos_emb(key, key, cos, sin)
    window = attention.config.sliding_window if family == "mistral" else getattr(attention, "sliding_window", None)
    found, _ = packed_attention(
        attention, query, key, value, None, packing.reading, scaling=attention.scaling, sliding_window=window
    )
    attended = read + attention.o_proj(found.flatten(2))
    return attended + layer.mlp(layer.post_attention_layernorm(attended))


def by_head(states: torch.Tensor, size: int) -> torch.Tensor:
    """[1, tokens, heads * size] to [1, heads, tokens, size]."""
    return states.unflatten(-1, (-1, size)).transpose(1, 2)
