"""The two layouts of a batch: where its tokens stand in the one row, and in padded rows, by hand."""

import numpy as np
import torch

from rag_retrieval.models.packing import Packing, padded_inputs
from rag_retrieval.models.token_batch import TokenBatch

CPU = torch.device("cpu")


def arrays(values: list[int]) -> np.ndarray:
    return np.array(values, np.int32)


def batch(ids: list[int], lengths: list[int], shared: list[int]) -> TokenBatch:
    zeros = arrays([0] * len(lengths))
    return TokenBatch(arrays(ids), None, arrays(lengths), arrays(shared), arrays(shared), zeros > 0, zeros)


# pairs of 3, 5, 4, 2 tokens; the second and third begin with the 2 tokens of the pair before
BATCH = batch(list(range(100, 114)), [3, 5, 4, 2], [0, 2, 2, 0])


def test_without_sharing_the_row_is_the_pairs_one_after_another():
    packing = Packing(BATCH, False, CPU)
    assert packing.lengths.tolist() == [3, 5, 4, 2] and packing.prefix_segments.tolist() == [-1, -1, -1, -1]
    assert packing.select(BATCH.ids).tolist() == [list(range(100, 114))]
    assert packing.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1]
    assert packing.pooled_index.tolist() == [0, 3, 8, 12], "an encoder is pooled at the first token"


def test_a_shared_prefix_stands_in_the_row_once():
    packing = Packing(BATCH, True, CPU)
    # 100 101 | 102 | (103 104 again) 105 106 107 | (108 109 again) 110 111 | 112 113
    assert packing.select(BATCH.ids).tolist() == [[100, 101, 102, 105, 106, 107, 110, 111, 112, 113]]
    assert packing.lengths.tolist() == [2, 1, 3, 2, 2] and packing.prefix_segments.tolist() == [-1, 0, 0, 0, -1]
    assert packing.positions.tolist() == [0, 1, 2, 2, 3, 4, 2, 3, 0, 1]
    assert packing.pooled_index.tolist() == [2, 5, 7, 9], "a decoder is pooled at the last token"


def test_a_kernel_gets_the_keys_of_every_segment_with_the_shared_ones_repeated():
    bounds = Packing(BATCH, True, CPU).kernel_bounds
    assert bounds.queries.tolist() == [0, 2, 3, 6, 8, 10]
    assert bounds.keys.tolist() == [0, 2, 5, 10, 14, 16]
    assert bounds.key_index.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 0, 1, 6, 7, 8, 9]
    assert (bounds.longest_query, bounds.longest_key) == (3, 5)
    assert bounds.queries.dtype == bounds.keys.dtype == torch.int32


def test_a_kernel_needs_no_index_where_nothing_is_shared():
    bounds = Packing(BATCH, False, CPU).kernel_bounds
    assert bounds.key_index is None
    assert bounds.keys.tolist() == bounds.queries.tolist() == [0, 3, 8, 12, 14]


def test_in_the_pooled_layout_one_token_of_each_pair_attends_to_all_of_its_keys():
    pooled = Packing(BATCH, True, CPU).pooled_layout
    assert pooled.query_lengths.tolist() == [1, 1, 1, 1]
    assert pooled.query_segments.tolist() == [1, 2, 3, 4], "the first segment is a prefix, not a pair"
    bounds = pooled.kernel_bounds
    assert bounds.queries.tolist() == [0, 1, 2, 3, 4]
    assert bounds.keys.tolist() == [0, 3, 8, 12, 14]
    assert bounds.key_index.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 0, 1, 6, 7, 8, 9]
    assert (bounds.longest_query, bounds.longest_key) == (1, 5)


def test_the_pooled_layout_leaves_the_layout_it_comes_from_alone():
    packing = Packing(BATCH, False, CPU)
    whole = packing.kernel_bounds
    assert packing.pooled_layout.kernel_bounds.longest_query == 1
    assert packing.kernel_bounds is whole and whole.longest_query == 5
    assert packing.pooled_layout.kernel_bounds.key_index is None


def test_neighbours_of_equal_length_attend_in_one_call_and_those_with_a_prefix_alone():
    same = batch(list(range(12)), [3, 3, 2, 2, 2], [0] * 5)
    assert [run[:5] for run in Packing(same, False, CPU).attention_runs] == [(2, 0, 3, 0, 3), (3, 6, 2, 6, 2)]
    pooled = Packing(same, False, CPU).pooled_layout
    assert [run[:5] for run in pooled.attention_runs] == [(2, 0, 1, 0, 3), (3, 2, 1, 6, 2)]
    runs = Packing(BATCH, True, CPU).attention_runs  # segments 2 | 1, 3, 2 after it | 2
    assert [run[1:5] for run in runs] == [(0, 2, 0, 2), (2, 1, 2, 1), (3, 3, 3, 3), (6, 2, 6, 2), (8, 2, 8, 2)]
    assert [run.prefix for run in runs] == [None, slice(0, 2), slice(0, 2), slice(0, 2), None]
    # two prefixes of equal length do not stand side by side where only the texts after them attend
    pooled = Packing(batch(list(range(8)), [2, 2, 2, 2], [0, 1, 0, 1]), True, CPU).pooled_layout
    assert [run.segments for run in pooled.attention_runs] == [1, 1, 1, 1]


def test_one_pair_is_one_segment():
    for causal, pooled in ((True, 1), (False, 0)):
        packing = Packing(batch([5, 6], [2], [0]), causal, CPU)
        assert packing.lengths.tolist() == [2] and packing.pooled_index.tolist() == [pooled]


def test_positions_begin_at_the_number_of_the_family_and_skip_padding_inside_a_text():
    # padding is token 1 and position 1, as in XLM-RoBERTa; transformers counts the other tokens from 2
    packing = Packing(batch([0, 7, 1, 8, 0, 1, 1, 9], [4, 4], [0, 0]), False, CPU, first_position=2)
    assert packing.positions.tolist() == [2, 3, 1, 4, 2, 1, 1, 3]
    assert Packing(batch([0, 7, 3, 8], [4], [0]), False, CPU, first_position=2).positions.tolist() == [2, 3, 4, 5]


def test_any_tree_is_laid_out_as_a_loop_over_the_pairs_does_it():
    draw = np.random.default_rng(0)
    for _ in range(50):
        lengths, shared, prefix = [], [], 0
        for _ in range(int(draw.integers(1, 12))):
            goes_on = bool(shared) and prefix > 0 and draw.random() < 0.6
            prefix = prefix if goes_on else int(draw.integers(0, 4))
            lengths.append(prefix + int(draw.integers(1, 5)))
            shared.append(prefix if goes_on else 0)
        ids = list(range(sum(lengths)))
        packing = Packing(batch(ids, lengths, shared), True, CPU)
        segments, row, positions, pooled = slow_layout(lengths, shared)
        assert list(zip(packing.lengths.tolist(), packing.prefix_segments.tolist(), strict=True)) == segments
        assert packing.select(np.array(ids, np.int32))[0].tolist() == row
        assert (packing.positions.tolist(), packing.pooled_index.tolist()) == (positions, pooled)


def slow_layout(lengths: list[int], shared: list[int]):
    segments, row, positions, pooled = [], [], [], []
    first, prefix_segment, prefix = 0, -1, 0
    for place, length in enumerate(lengths):
        if shared[place] == 0:  # the shared prefix, if any, is as long as the next pair says
            prefix = shared[place + 1] if place + 1 < len(shared) else 0
            prefix_segment = len(segments) if prefix else -1
            if prefix:
                segments.append((prefix, -1))
                row += range(first, first + prefix)
                positions += range(prefix)
        segments.append((length - prefix, prefix_segment))
        row += range(first + prefix, first + length)
        positions += range(prefix, length)
        pooled.append(len(row) - 1)
        first += length
    return segments, row, positions, pooled


# ---- padded ----------------------------------------------------------------------------------------------


def test_padding_stands_at_the_right_with_mask_and_segment_zero():
    typed = batch([7, 8, 4, 5, 6, 9, 7], [2, 4, 1], [0, 0, 0])
    typed.types = arrays([0, 1, 0, 0, 1, 1, 1])
    inputs = padded_inputs(typed, 3, CPU)
    assert inputs["input_ids"].tolist() == [[7, 8, 3, 3], [4, 5, 6, 9], [7, 3, 3, 3]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert inputs["token_type_ids"].tolist() == [[0, 1, 0, 0], [0, 0, 1, 1], [1, 0, 0, 0]]
    assert {values.dtype for values in inputs.values()} == {torch.int64}


def test_families_without_segments_get_no_token_types():
    assert sorted(padded_inputs(batch([7, 8], [2], [0]), 0, CPU)) == ["attention_mask", "input_ids"]


def test_a_real_token_equal_to_the_pad_token_is_not_masked():
    inputs = padded_inputs(batch([3, 3, 1, 2, 3], [2, 3], [0, 0]), 3, CPU)
    assert inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_both_layouts_are_made_on_the_device_of_the_model():
    device = torch.device("meta")
    assert Packing(BATCH, False, device).positions.device.type == "meta"
    assert padded_inputs(BATCH, 0, device)["input_ids"].device.type == "meta"
