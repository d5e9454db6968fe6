"""Poolings against arithmetic by hand and loops over tokens."""

import numpy as np
import torch

from rag_retrieval.models.pooling import packed_sums, token_weights
from rag_retrieval.models.token_batch import TokenBatch


def batch(lengths: list[int], starts: list[int] | None = None) -> TokenBatch:
    lengths = np.array(lengths, np.int32)
    starts = np.zeros_like(lengths) if starts is None else np.array(starts, np.int32)
    zeros = np.zeros_like(lengths)
    return TokenBatch(np.zeros(lengths.sum(), np.int32), None, lengths, zeros, starts, zeros > 0, zeros)


def test_weights_of_the_mean_and_the_weighted_mean():
    assert token_weights("mean", batch([2, 1, 4])).tolist() == [0.5, 0.5, 1.0, 0.25, 0.25, 0.25, 0.25]
    expected = np.array([1 / 3, 2 / 3, 1, 0.1, 0.2, 0.3, 0.4], np.float32)
    np.testing.assert_allclose(token_weights("weighted_mean", batch([2, 1, 4])), expected)


def test_a_prompt_that_is_left_out_has_no_weight():
    weights = token_weights("mean", batch([4, 3, 2], [2, 0, 2]), include_prompt=False)
    np.testing.assert_allclose(weights, [0, 0, 1 / 2, 1 / 2, 1 / 3, 1 / 3, 1 / 3, 0, 0], rtol=1e-6)
    # weights keep their places in the whole text, as in sentence-transformers
    weights = token_weights("weighted_mean", batch([4], [2]), include_prompt=False)
    np.testing.assert_allclose(weights, [0, 0, 3 / 7, 4 / 7], rtol=1e-6)
    assert token_weights("mean", batch([4], [2])).tolist() == [0.25] * 4


def test_every_cls_of_a_long_text_has_equal_weight():
    # cls a b cls c d cls e sep: the sep at place 8 is none, nor is one at place 6 of a text that ends there
    weights = token_weights("cls", batch([9, 7, 2]), cls_interval=3, suffix=1)
    third, half = np.float32(1 / 3), 0.5
    assert weights.tolist() == [third, 0, 0, third, 0, 0, third, 0, 0, *[half, 0, 0, half, 0, 0, 0], 1, 0]


def test_the_sum_over_tokens_is_that_of_a_loop_and_so_is_its_gradient():
    generator = torch.Generator().manual_seed(0)
    lengths = np.array([3, 1, 5], np.int32)
    states = torch.randn(9, 4, generator=generator, requires_grad=True)
    weights = np.random.default_rng(0).random(9).astype(np.float32)
    sums = packed_sums(states, weights, lengths)
    expected, place = torch.zeros(3, 4), 0
    for text, length in enumerate(lengths):
        for _ in range(length):
            expected[text] += weights[place] * states.detach()[place]
            place += 1
    torch.testing.assert_close(sums, expected)
    (sums * torch.arange(3.0)[:, None]).sum().backward()
    owner = np.repeat(np.arange(3.0), lengths)
    torch.testing.assert_close(states.grad, torch.from_numpy(weights * owner).float()[:, None].expand(9, 4))


def test_sums_are_taken_in_float32():
    states = torch.full((3000, 1), 1.0, dtype=torch.bfloat16)  # 256 + 1 is 256 in bfloat16
    sums = packed_sums(states, np.ones(3000, np.float32), np.array([3000], np.int32))
    assert sums.dtype == torch.float32 and sums.item() == 3000
