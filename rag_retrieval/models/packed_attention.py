"""Attention within the segments of a packed row, and how a CPU and a GPU compute it.

The function is registered with transformers under ATTENTION. A model that uses it computes ordinary SDPA whenever no
`packing` comes with the call, so the same model also serves padded batches and other callers.

Attention dropout is not applied to packed batches: the variable-length kernels have none, and a CPU's fast one neither.
"""

import inspect
from functools import cache

import numpy as np
import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rag_retrieval.models.packing import Packing
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

    In float32 whatever comes, under autocast too, which would cast it back: a CPU's bfloat16 kernel has the slower
    backward pass.
    """
    dtype, runs = query.dtype, packing.attention_runs
    # [tokens, heads, size]; the backward of tensor[0] would copy
    query, key, value = (tensor.squeeze(0).transpose(0, 1).float() for tensor in (query, key, value))
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:  # by itself SDPA leaves its fast path for fewer key heads
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    query_spans = [(run.query_start, run.segments * run.query_length) for run in runs]
    spans = [(run.start, run.segments * run.length) for run in runs]
    outputs, prefixes = [], {}
    for run, *own in zip(runs, cut(query, query_spans), cut(key, spans), cut(value, spans), strict=True):
        # [segments, heads, length, size]
        own_query, own_key, own_value = (part.unflatten(0, (run.segments, -1)).transpose(1, 2) for part in own)
        if run.prefix is not None:
            if run.prefix.start not in prefixes:  # one view for all texts of the prefix: one backward
                prefixes[run.prefix.start] = [part[run.prefix].transpose(0, 1)[None] for part in (key, value)]
            shared_key, shared_value = prefixes[run.prefix.start]
            own_key, own_value = torch.cat([shared_key, own_key], dim=2), torch.cat([shared_value, own_value], dim=2)
        mask = visible_keys(run.query_length, own_key.shape[2], causal, window, query.device)
        square = causal and mask is None and run.query_length > 1
        with torch.autocast(query.device.type, enabled=False):
            output = scaled_dot_product_attention(
                own_query, own_key, own_value, attn_mask=mask, is_causal=square, scale=scale
            )
        outputs.append(output.transpose(1, 2).flatten(0, 1))
    return torch.cat(outputs)[None].to(dtype)


def cut(row: torch.Tensor, spans: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    """Parts of a row, [tokens, ...], by start and length; ascending, without overlap.

    The backward of a split writes a row of gradients once; that of a slice writes one for every part.
    """
    sizes, end = [], 0
    for start, length in spans:
        sizes += [start - end, length]
        end = start + length
    return row.split([*sizes, len(row) - end])[1::2]


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
