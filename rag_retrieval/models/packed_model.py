"""The padding-free forward of a family: attention within the segments of a packed row, a last layer that computes only
the pooled tokens, and the head over one vector for each text.

Our attention function is registered with transformers under ATTENTION. A model that uses it computes ordinary SDPA
whenever no `packing` comes with the call, so the same model also serves padded batches and other callers. Whether a
family can be packed is measured: `packing_problem` compares packed with padded scores when a model is loaded, and
whatever differs, or has no head here, is computed padded.

Attention dropout is not applied to packed batches: the variable-length kernels have none, and a CPU's fast one neither.
Hidden dropout is applied as usual.
"""

import inspect
from collections.abc import Callable
from functools import cache, partial

import numpy as np
import torch
from torch import nn
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_outputs import ModelOutput
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from rag_retrieval.models.packing import Packing
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder
from rag_retrieval.models.scoring import evaluating
from rag_retrieval.models.token_batch import TokenBatch

ATTENTION = "rag_retrieval_packed"
HALF = (torch.bfloat16, torch.float16)
KERNEL_TOLERANCE = 0.03  # of scores of order 1 in half precision; a wrong neighbour changes them by more


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    packing: Packing | None = None,
    **options,
) -> tuple[torch.Tensor, None]:
    """Attention within the segments of `packing`, or SDPA over the padded batch where there is none.

    query: [1, heads, query tokens, size]; key, value: [1, as many or fewer heads, tokens, size]. Returns [1, query
    tokens, heads, size]. options: scaling, is_causal, sliding_window (tokens at a smaller distance are visible) and
    whatever else SDPA takes. Raises ValueError for a softcap, which neither computes.
    """
    if packing is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    if options.get("softcap") is not None:
        raise ValueError("attention with a softcap cannot be packed")
    causal = options.get("is_causal")
    causal = getattr(module, "is_causal", True) if causal is None else causal
    kernel = varlen_kernel if query.is_cuda and query.dtype in HALF else sdpa_by_segment
    scale = options.get("scaling")
    return kernel(query, key, value, packing, causal, options.get("sliding_window"), scale), None


AttentionInterface.register(ATTENTION, packed_attention)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)  # of padded batches: without it they would get no mask


def sdpa_by_segment(query, key, value, packing: Packing, causal: bool, window: int | None, scale: float | None):
    """One SDPA call for neighbours of equal length: the fastest on a CPU, and the reference for other kernels.

    In float32 whatever comes: a CPU's bfloat16 kernel takes 1.3 times as long forward and 3.9 times as long
    backward (13 segments of 150 tokens, 12 heads of 32; torch 2.13, AVX512_BF16), the casts included.
    """
    dtype = query.dtype
    query, key, value = query.float(), key.float(), value.float()
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:  # by itself SDPA leaves its fast path for fewer key heads
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    outputs = []
    for run in packing.attention_runs:
        own_query = by_segment(query, run.query_start, run.segments, run.query_length)
        own_key, own_value = (by_segment(tensor, run.start, run.segments, run.length) for tensor in (key, value))
        if run.prefix is not None:
            own_key = torch.cat([key[:, :, run.prefix], own_key], dim=2)
            own_value = torch.cat([value[:, :, run.prefix], own_value], dim=2)
        mask = visible_keys(run.query_length, own_key.shape[2], causal, window, query.device)
        square = causal and mask is None and run.query_length > 1
        output = scaled_dot_product_attention(
            own_query, own_key, own_value, attn_mask=mask, is_causal=square, scale=scale
        )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None].to(dtype)


def by_segment(states: torch.Tensor, start: int, segments: int, length: int) -> torch.Tensor:
    """[1, heads, row, size] to [segments, heads, length, size], of segments of equal length from `start` on."""
    own = states[:, :, start : start + segments * length]
    return own if segments == 1 else own[0].unflatten(1, (segments, length)).transpose(0, 1)


def visible_keys(
    queries: int, keys: int, causal: bool, window: int | None, device: torch.device
) -> torch.Tensor | None:
    """[queries, keys], bool: which keys a segment's tokens attend to; the queries are the last of the keys.

    None where SDPA needs no mask: all attend to all, as the last one alone does, or a plain causal square. Where there
    are more queries than keys, nothing is causal or windowed.
    """
    windowed = window is not None and keys > window
    if not windowed and (not causal or queries in (1, keys)):
        return None
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    visible = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return visible & (distance.abs() < window) if windowed else visible


def varlen_kernel(query, key, value, packing: Packing, causal: bool, window: int | None, scale: float | None):
    """The same with torch's variable-length kernel: half precision on CUDA."""
    query, key, value = (tensor[0].transpose(0, 1) for tensor in (query, key, value))  # [tokens, heads, size]
    bounds = packing.kernel_bounds
    if bounds.key_index is not None:
        key, value = key[bounds.key_index], value[bounds.key_index]
    options = {"scale": scale, "window_size": kernel_window(causal, window)}
    if key.shape[1] != query.shape[1]:
        if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 has it not
            options["enable_gqa"] = True
        else:
            repeats = query.shape[1] // key.shape[1]
            key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    output = varlen_attn(
        query, key, value, bounds.queries, bounds.keys, bounds.longest_query, bounds.longest_key, **options
    )
    return output[None]


def kernel_window(causal: bool, window: int | None) -> tuple[int, int]:
    """How many tokens (left, right) are visible beside the own one; -1 for all. Causal counts from the last key."""
    reach = -1 if window is None else window - 1
    return reach, 0 if causal else reach


@cache
def kernel_problem(
    device: torch.device, dtype: torch.dtype, heads: tuple[int, int], head_size: int, causal: bool, windowed: bool
) -> str | None:
    """Why packed batches cannot be computed there, or None. Tried once for each kind of attention, on random numbers.

    heads: of queries, of keys. windowed: whether some layers see a sliding window. A CPU computes them in any dtype.
    CUDA needs half precision and a variable-length kernel.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda" or dtype not in HALF:
        return f"no variable-length kernel for {dtype} on {device.type}"
    generator = torch.Generator().manual_seed(0)
    lengths, shared = np.array([5, 70, 68, 1], np.int32), np.array([0, 0, 60, 0], np.int32)
    nothing = np.zeros_like(lengths)
    batch = TokenBatch(np.zeros(lengths.sum(), np.int32), None, lengths, shared, shared, nothing > 0, nothing)
    packing = Packing(batch, causal, device)
    tokens = int(packing.lengths.sum())
    query, key, value = (
        torch.randn(1, count, tokens, head_size, generator=generator, dtype=torch.float32).to(device, dtype)
        for count in (heads[0], heads[1], heads[1])
    )
    largest = 0.0
    for layout, queries in ((packing, query), (packing.pooled_layout, query[:, :, packing.pooled_index])):
        for window in (None, 16) if windowed else (None,):
            arguments = (queries, key, value, layout, causal, window, None)
            try:
                difference = (varlen_kernel(*arguments) - sdpa_by_segment(*arguments)).abs().max().item()
            except (RuntimeError, NotImplementedError) as error:
                return f"torch's variable-length kernel does not run here ({' '.join(str(error).split()):.120})"
            largest = max(largest, difference)
    return None if largest < KERNEL_TOLERANCE else f"torch's variable-length kernel is off by {largest:.3g}"


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
