"""Attention over packed pairs: the function that transformers calls when a batch has no padding.

Registered once under ATTENTION. A model that uses it computes ordinary SDPA whenever no `packing` comes with the
call, so the same model also serves padded batches and other callers.

What a reader would get wrong: attention dropout is not applied to packed batches. The kernels for variable lengths
have none, and a CPU's fast one neither; hidden dropout is applied as ever.
"""

import inspect
from functools import cache

import torch
from torch.nn.attention.varlen import varlen_attn
from torch.nn.functional import scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rag_retrieval.models.packing import Packing
from rag_retrieval.models.pair_batch import PairBatch

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

    query: [1, heads, asking tokens, size]; key, value: [1, as many or fewer heads, tokens, size]. Returns [1, asking
    tokens, heads, size]. options: scaling, is_causal, sliding_window (tokens at a distance of less are seen) and
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
    """One SDPA call for each segment: the fastest on a CPU, and the reference for other kernels.

    In float32 whatever comes: a CPU's bfloat16 kernel takes 1.3 times as long forward and 3.9 times as long
    backward (13 segments of 150 tokens, 12 heads of 32; torch 2.13, AVX512_BF16), the casts included.
    """
    dtype = query.dtype
    query, key, value = query.float(), key.float(), value.float()
    repeats = query.shape[1] // key.shape[1]
    if repeats > 1:  # by itself SDPA leaves its fast path for fewer key heads
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    queries = query.split([asking for asking, _ in packing.queries], dim=2)
    keys, values = (tensor.split(packing.lengths, dim=2) for tensor in (key, value))
    outputs = []
    for own_queries, (asking, place) in zip(queries, packing.queries, strict=True):
        own_keys, own_values = keys[place], values[place]
        if (root := packing.segments[place].begins_with) is not None:
            own_keys = torch.cat([keys[root], own_keys], dim=2)
            own_values = torch.cat([values[root], own_values], dim=2)
        mask = visible(asking, own_keys.shape[2], causal, window, query.device)
        square = causal and mask is None and asking > 1
        outputs.append(
            scaled_dot_product_attention(
                own_queries, own_keys, own_values, attn_mask=mask, is_causal=square, scale=scale
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).to(dtype)


def visible(queries: int, keys: int, causal: bool, window: int | None, device: torch.device) -> torch.Tensor | None:
    """[queries, keys], bool: which keys a segment's tokens see; the queries are the last of the keys.

    None where SDPA needs no mask: all see all, as the last one alone does, or a plain causal square.
    """
    windowed = window is not None and keys > window
    if not windowed and (not causal or queries in (1, keys)):
        return None
    distance = torch.arange(keys - queries, keys, device=device)[:, None] - torch.arange(keys, device=device)
    seen = distance >= 0 if causal else torch.ones_like(distance, dtype=torch.bool)
    return seen & (distance.abs() < window) if windowed else seen


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
    """How many tokens (left, right) are seen beside the own one; -1 for all. Causal counts from the last key."""
    reach = -1 if window is None else window - 1
    return reach, 0 if causal else reach


@cache
def kernel_problem(device: torch.device, dtype: torch.dtype) -> str | None:
    """Why packed batches cannot be computed there, or None. Tried once, on random numbers.

    A CPU computes them in any dtype. CUDA needs half precision and a kernel for variable lengths.
    """
    if device.type == "cpu":
        return None
    if device.type != "cuda" or dtype not in HALF:
        return f"no kernel for variable lengths in {dtype} on {device.type}"
    generator = torch.Generator().manual_seed(0)
    lengths, shared = [5, 70, 68, 1], [0, 0, 60, 0]
    tokens = torch.zeros(sum(lengths), dtype=torch.int64, device=device)
    packing = Packing(PairBatch(tokens, None, lengths, shared), causal=True)
    shape = (3, 1, 4, sum(packing.lengths), 64)
    query, key, value = torch.randn(shape, generator=generator).to(device, dtype)
    arguments = (query, key, value, packing, True, None, None)
    try:
        difference = (varlen_kernel(*arguments) - sdpa_by_segment(*arguments)).abs().max().item()
    except (RuntimeError, NotImplementedError) as error:
        return f"torch's kernel for variable lengths does not run here ({' '.join(str(error).split()):.120})"
    return None if difference < KERNEL_TOLERANCE else f"torch's kernel for variable lengths is off by {difference:.3g}"
