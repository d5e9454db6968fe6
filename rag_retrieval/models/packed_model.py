"""The padding-free forward of a family: attention within the segments of a packed row, a last layer that computes only
the pooled tokens, and the head over one vector for each text.

Whether a family can be packed is measured: `packing_problem` compares packed with padded scores when a model is loaded,
and whatever differs, or has no head here, is computed padded. Hidden dropout is applied as usual, that of attention
weights is not (`packed_attention`).
"""

import inspect
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import ModelOutput
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rag_retrieval.models.packed_attention import ATTENTION, packed_attention
from rag_retrieval.models.packing import Packing
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder
from rag_retrieval.models.scoring import evaluating
from rag_retrieval.models.token_batch import TokenBatch

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-6}  # of scores, relative where they exceed 1
HALF_TOLERANCE = 0.03
NOT_A_MASK = (1, 1, 1, 1)  # a 4-dimensional mask is used as it is: the family builds no other


def packed_outputs(model: PreTrainedModel, batch: TokenBatch, packing: Packing, **options) -> ModelOutput:
    """The backbone's outputs for the packed row. options: of its forward."""
    backbone = model.base_model  # itself, where it has no head
    inputs = {
        "input_ids": packing.select(batch.ids),
        "position_ids": packing.positions[None],
        "attention_mask": torch.zeros(NOT_A_MASK, dtype=torch.float32, device=packing.device),
        "packing": packing,
    }
    accepted = inspect.signature(backbone.forward).parameters
    if "token_type_ids" in accepted:  # left out, some families look up a table as long as one text
        types = np.zeros_like(batch.ids) if batch.types is None else batch.types
        inputs["token_type_ids"] = packing.select(types)
    if "use_cache" in accepted:
        inputs["use_cache"] = False
    return backbone(**inputs, **options)


def pooled_states(hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
    """The states that the head reads: [texts, hidden]."""
    # one state for each text is what the last layer gave, or what texts of one token have anyway
    return hidden if len(hidden) == len(packing.pooled_index) else hidden[packing.pooled_index]


def pooler_head(model: PreTrainedModel, hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
    pooled = getattr(model, model.base_model_prefix).pooler(pooled_states(hidden, packing)[:, None])
    return model.classifier(model.dropout(pooled))


def first_token_head(model: PreTrainedModel, hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
    return model.classifier(pooled_states(hidden, packing)[:, None])  # it takes the first of a row's tokens itself


def modernbert_head(model: PreTrainedModel, hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
    if model.config.classifier_pooling == "cls":
        pooled = pooled_states(hidden, packing)
    else:
        pooled = torch.stack([text.mean(dim=0) for text in hidden.split(packing.lengths.tolist())])
    return model.classifier(model.drop(model.head(pooled)))


def last_token_head(model: PreTrainedModel, hidden: torch.Tensor, packing: Packing) -> torch.Tensor:
    return model.score(pooled_states(hidden, packing))


Head = Callable[[PreTrainedModel, torch.Tensor, Packing], torch.Tensor]

ENCODER_HEADS: dict[str, Head] = {
    "bert": pooler_head,
    "roberta": first_token_head,
    "xlm-roberta": first_token_head,
    "camembert": first_token_head,
    "electra": first_token_head,
    "modernbert": modernbert_head,
}


def packing_problem(
    model: PreTrainedModel,
    padded_scores: Callable[[TokenBatch], torch.Tensor],
    packed_scores: Callable[[TokenBatch], torch.Tensor],
    batch: TokenBatch,
    half_tolerance: float = HALF_TOLERANCE,
    reads_one_token: bool = True,
) -> str | None:
    """Why this model cannot be packed, or None: then it has been given our attention function and last layer.

    Compares both scores of `batch`, whose pairs should differ in length, share a query, and exceed a sliding window
    where the model has one: [pairs], or several numbers of order 1 for each. half_tolerance: of scores of a model in
    half precision, relative where they exceed 1. reads_one_token: whether the head reads one token's state, so that
    the last layer need not compute the others. The model is left in its mode; no random number is drawn.
    """
    own = model.config._attn_implementation
    problem = "its attention cannot be replaced"
    with evaluating(model):
        expected = padded_scores(batch)
        try:
            model.set_attn_implementation(ATTENTION)
            if reads_one_token:
                prune_last_layer(model)
            if model.config._attn_implementation == ATTENTION:
                problem = difference(expected, packed_scores(batch), model.dtype, half_tolerance)
        except Exception as error:  # whatever a family's own code raises when it is called in another way
            problem = f"{type(error).__name__}: {' '.join(str(error).split()):.120}"
    if problem is not None:
        model.set_attn_implementation(own)
    return problem


def attention_dropout(model: PreTrainedModel) -> float:
    """The rate of dropout on attention weights that the config asks for, under either of its two names."""
    config = model.config.get_text_config()
    return getattr(config, "attention_probs_dropout_prob", None) or getattr(config, "attention_dropout", None) or 0.0


def sliding_window(model: PreTrainedModel) -> int:
    """Tokens, 0 for a model without one; half of them to each side, in some families."""
    config = model.config.get_text_config()
    return getattr(config, "local_attention", None) or getattr(config, "sliding_window", None) or 0


def pairs_to_check(model: PreTrainedModel, encoder: PairEncoder) -> list[EncodedPair]:
    """Pairs for `packing_problem`: one with every special token inside, and the last longer than a sliding window, if
    there is one within max_length.

    The other tokens come from all over the vocabulary: of a text of our own a tokenizer may know no word.
    """
    window = sliding_window(model)
    tokens = 2 * window if window < encoder.max_length else 0
    size = min(len(encoder.tokenizer), model.config.get_text_config().vocab_size)
    special = sorted(token for token in set(encoder.tokenizer.all_special_ids) if token < size)
    ordinary = [token for token in range(0, size, max(1, size // 1000)) if token not in special]

    def ids(first: int, count: int) -> list[int]:
        return [ordinary[(first + 7 * place) % len(ordinary)] for place in range(count)]

    with_special = [token for place, token in enumerate(special) for token in (*ids(place, 1), token)] + ids(4, 1)
    return [
        encoder.join(ids(1, 1), ids(0, 0)),
        encoder.join(ids(2, 2), ids(3, 5)),
        encoder.join(ids(2, 2), with_special),
        encoder.join(ids(2, 2), ids(5, tokens + 9)),
    ]


def difference(
    expected: torch.Tensor, packed: torch.Tensor, dtype: torch.dtype, half_tolerance: float = HALF_TOLERANCE
) -> str | None:
    tolerance = TOLERANCE.get(dtype, half_tolerance) * max(1.0, expected.abs().max().item())
    largest = (expected - packed).abs().max().item()
    if not largest <= tolerance:  # NaN too
        return f"packed scores differ from padded ones by {largest:.2g}"
    if (expected.amax(dim=0) - expected.amin(dim=0)).max() <= tolerance:
        return "all pairs get the same score, so that packing cannot be checked"
    return None


LIKE_BERT = ("bert", "roberta", "xlm-roberta", "camembert", "electra")
LIKE_LLAMA = ("llama", "qwen2", "qwen3", "mistral", "gemma")


def prune_last_layer(model: PreTrainedModel) -> None:
    """Let the last layer compute only the pooled token of each text of a packed batch, in the families known here.

    Every token's key and value are needed there, but no other token's query, output and feed-forward: five sixths of an
    encoder layer's products fall away, 14 percent of a six-layer model, and no score changes. The layer then gives one
    vector for each text. Padded batches, and those of which other states are read too, take the family's own forward.
    Gradient checkpointing does not recompute the layer (newer transformers wrap the family's `forward`), and need not:
    the backward begins with it.
    """
    if model.config.model_type in LIKE_BERT:
        layer, forward = model.base_model.encoder.layer[-1], pruned_bert_layer
    elif model.config.model_type in LIKE_LLAMA:
        layer, forward = model.base_model.layers[-1], pruned_llama_layer
    else:
        return
    layer.forward = partial(forward, layer)  # a partial is copied with its layer, for other devices


def pruned_bert_layer(layer: nn.Module, hidden: torch.Tensor, *arguments, packing: Packing | None = None, **options):
    """hidden: [1, tokens, hidden]. Returns [1, texts, hidden]."""
    if packing is None or not packing.pooled_alone:
        return type(layer).forward(layer, hidden, *arguments, packing=packing, **options)
    attention = layer.attention.self
    pooled = hidden[:, packing.pooled_index]
    query, key, value = (
        project(states).unflatten(-1, (-1, attention.attention_head_size)).transpose(1, 2)  # [1, heads, tokens, size]
        for project, states in ((attention.query, pooled), (attention.key, hidden), (attention.value, hidden))
    )
    attended, _ = packed_attention(attention, query, key, value, None, packing.pooled_layout, scaling=attention.scaling)
    return layer.feed_forward_chunk(layer.attention.output(attended.flatten(2), pooled))


def pruned_llama_layer(layer: nn.Module, hidden: torch.Tensor, *arguments, packing: Packing | None = None, **options):
    """hidden: [1, tokens, hidden]. Returns [1, texts, hidden]."""
    if packing is None or not packing.pooled_alone:
        return type(layer).forward(layer, hidden, *arguments, packing=packing, **options)
    attention = layer.self_attn
    states, pooled = layer.input_layernorm(hidden), hidden[:, packing.pooled_index]
    query, key, value = (
        project(states).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)  # [1, heads, tokens, size]
        for project, states in (
            (attention.q_proj, states[:, packing.pooled_index]),
            (attention.k_proj, states),
            (attention.v_proj, states),
        )
    )
    family = attention.config.model_type
    if family == "qwen3":
        query, key = attention.q_norm(query), attention.k_norm(key)
    cos, sin = options["position_embeddings"]
    query, _ = apply_rotary_pos_emb(query, query, cos[:, packing.pooled_index], sin[:, packing.pooled_index])
    _, key = apply_rotary_pos_emb(key, key, cos, sin)
    window = attention.config.sliding_window if family == "mistral" else getattr(attention, "sliding_window", None)
    attended, _ = packed_attention(
        attention, query, key, value, None, packing.pooled_layout, scaling=attention.scaling, sliding_window=window
    )
    attended = pooled + attention.o_proj(attended.flatten(2))
    return attended + layer.mlp(layer.post_attention_layernorm(attended))
