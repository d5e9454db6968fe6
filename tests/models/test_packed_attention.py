"""Attention over packed pairs against plain softmax attention with a mask over the whole row."""

import numpy as np
import pytest
import torch
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from rag_retrieval.models import packed_attention as packed
from rag_retrieval.models.packing import Packing
from rag_retrieval.models.token_batch import TokenBatch

LENGTHS, SHARED = [3, 9, 7, 1, 12], [0, 2, 2, 0, 0]
HEADS, SIZE = 4, 8


class Layer(torch.nn.Module):
    def __init__(self, causal: bool):
        super().__init__()
        self.is_causal = causal


def row(share: bool, key_heads: int = HEADS, dtype=torch.float32):
    lengths, shared = np.array(LENGTHS, np.int32), np.array(SHARED, np.int32)
    zeros = np.zeros_like(lengths)
    batch = TokenBatch(np.zeros(sum(LENGTHS), np.int32), None, lengths, shared, shared, zeros > 0, zeros)
    packing = Packing(batch, share, torch.device("cpu"))
    generator = torch.Generator().manual_seed(0)

    def draw(heads):
        shape = (1, heads, int(packing.lengths.sum()), SIZE)
        return torch.randn(shape, generator=generator, dtype=dtype).requires_grad_()

    return packing, draw(HEADS), draw(key_heads), draw(key_heads)


def slow_attention(query, key, value, packing, causal, window, scale):
    """Softmax over every key of the row, all but the visible ones at minus infinity, token by token."""
    owner = [place for place, length in enumerate(packing.lengths) for _ in range(length)]
    position = packing.positions.tolist()
    tokens = range(len(owner))

    def sees(i, j):
        own = owner[j] in (owner[i], packing.prefix_segments[owner[i]])
        distance = position[i] - position[j]
        return own and not (causal and distance < 0) and not (window and abs(distance) >= window)

    mask = torch.tensor([[sees(i, j) for j in tokens] for i in tokens])
    key, value = (tensor.repeat_interleave(HEADS // tensor.shape[1], dim=1) for tensor in (key, value))
    logits = (query @ key.transpose(2, 3) * scale).masked_fill(~mask, -torch.inf)
    return (logits.softmax(-1) @ value).transpose(1, 2)


@pytest.mark.parametrize("key_heads", [HEADS, 2])
@pytest.mark.parametrize("window", [None, 4])
@pytest.mark.parametrize(("causal", "share"), [(False, False), (True, False), (True, True)])
def test_every_token_sees_what_it_should_and_nothing_else(causal, share, window, key_heads):
    packing, *tensors = row(share, key_heads)
    options = {"scaling": 0.3, "sliding_window": window, "dropout": 0.5}
    found, weights = packed.packed_attention(Layer(causal), *tensors, None, packing=packing, **options)
    expected = slow_attention(*tensors, packing, causal, window, 0.3)
    assert weights is None
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients = torch.autograd.grad((found * weight).sum(), tensors)
    for gradient, right in zip(gradients, torch.autograd.grad((expected * weight).sum(), tensors), strict=True):
        torch.testing.assert_close(gradient, right, atol=2e-6, rtol=0)


@pytest.mark.parametrize("window", [None, 4])
def test_the_token_that_is_read_sees_what_it_sees_among_all(window):
    packing, query, key, value = row(True)
    options = {"scaling": 0.3, "sliding_window": window}
    everywhere, _ = packed.packed_attention(Layer(True), query, key, value, None, packing=packing, **options)
    asking = query[:, :, packing.pooled_index]
    found, _ = packed.packed_attention(Layer(True), asking, key, value, None, packing=packing.pooled_layout, **options)
    expected = everywhere[:, packing.pooled_index]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    weight = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1))
    gradients, right = (torch.autograd.grad((of * weight).sum(), (query, key, value)) for of in (found, expected))
    torch.testing.assert_close(gradients, right, atol=2e-6, rtol=0)


def test_autocast_changes_nothing_on_a_cpu():
    packing, *tensors = row(True)
    expected, _ = packed.packed_attention(Layer(True), *tensors, None, packing=packing)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, _ = packed.packed_attention(Layer(True), *tensors, None, packing=packing)
    assert torch.equal(found, expected)


def test_a_row_is_cut_into_parts_and_what_lies_between_them_is_left_out():
    found = packed.cut(torch.arange(7), [(0, 2), (3, 1), (4, 2)])
    assert [part.tolist() for part in found] == [[0, 1], [3], [4, 5]]


def test_without_packing_it_is_ordinary_sdpa():
    _, query, key, value = row(False)
    mask = torch.rand(1, 1, 32, 32, generator=torch.Generator().manual_seed(2)) < 0.9
    mask |= torch.eye(32, dtype=torch.bool)
    found, _ = packed.packed_attention(Layer(True), query, key, value, mask, scaling=0.3)
    expected, _ = sdpa_attention_forward(Layer(True), query, key, value, mask, scaling=0.3)
    assert torch.equal(found, expected)


def test_an_argument_says_whether_it_is_causal_before_the_layer_does():
    packing, *tensors = row(False)
    found, _ = packed.packed_attention(Layer(True), *tensors, None, packing=packing, is_causal=False, scaling=1.0)
    torch.testing.assert_close(found, slow_attention(*tensors, packing, False, None, 1.0), atol=2e-6, rtol=0)


def test_a_softcap_is_refused():
    packing, *tensors = row(False)
    with pytest.raises(ValueError, match="softcap"):
        packed.packed_attention(Layer(True), *tensors, None, packing=packing, softcap=50.0)


@pytest.mark.parametrize(
    ("causal", "window", "expected"),
    [(True, None, (-1, 0)), (True, 16, (15, 0)), (False, None, (-1, -1)), (False, 65, (64, 64))],
)
def test_a_window_counts_the_own_token_and_the_kernel_does_not(causal, window, expected):
    assert packed.kernel_window(causal, window) == expected


def test_a_cpu_packs_in_every_dtype_and_other_devices_only_where_a_kernel_was_seen_to_work():
    kind = ((4, 2), 64, True, False)
    assert packed.kernel_problem(torch.device("cpu"), torch.float32, *kind) is None
    assert "float32 on cuda" in packed.kernel_problem(torch.device("cuda"), torch.float32, *kind)
    assert "bfloat16 on mps" in packed.kernel_problem(torch.device("mps"), torch.bfloat16, *kind)


def test_the_kernel_gets_rows_of_tokens_with_their_bounds_and_repeated_keys(monkeypatch):
    """On a machine without a GPU: torch's kernel is stood in for by SDPA over the same segments, one by one."""
    packing, query, key, value = row(True, dtype=torch.float32)

    def kernel(query, key, value, cu_q, cu_k, longest_q, longest_k, *, scale, window_size):
        assert window_size == (-1, 0) and (longest_q, longest_k) == (12, 12)
        outputs = []
        for place in range(len(cu_q) - 1):
            own = query[cu_q[place] : cu_q[place + 1]].transpose(0, 1)
            keys, values = (t[cu_k[place] : cu_k[place + 1]].transpose(0, 1) for t in (key, value))
            mask = torch.ones(own.shape[1], keys.shape[1], dtype=torch.bool).tril(keys.shape[1] - own.shape[1])
            outputs.append(torch.nn.functional.scaled_dot_product_attention(own, keys, values, mask, scale=scale))
        return torch.cat(outputs, dim=1).transpose(0, 1)

    monkeypatch.setattr(packed, "varlen_attn", kernel)
    found = packed.varlen_kernel(query, key, value, packing, True, None, 0.3)
    torch.testing.assert_close(found, slow_attention(query, key, value, packing, True, None, 0.3), atol=1e-6, rtol=0)


def test_fewer_key_heads_are_repeated_where_the_kernel_does_not_know_them(monkeypatch):
    packing, query, key, value = row(False, key_heads=2)
    seen = []

    def kernel(query, key, value, *bounds, scale, window_size):
        seen.append((key.shape[1], value.shape[1]))
        return query

    monkeypatch.setattr(packed, "varlen_attn", kernel)
    packed.varlen_kernel(query, key, value, packing, True, None, None)
    assert seen == [(HEADS, HEADS)]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="the kernel for variable lengths needs a GPU")
@pytest.mark.parametrize("dtype", packed.HALF)
def test_the_kernel_of_this_gpu_agrees_with_sdpa(dtype):
    for kind in (((4, 4), 32, False, True), ((4, 2), 64, True, True), ((4, 1), 128, True, False)):
        assert packed.kernel_problem(torch.device("cuda", 0), dtype, *kind) is None
