"""Packing: where the tokens of a batch stand in the one row, by hand."""

import pytest
import torch

from rag_retrieval.models.packing import Packing, Segment
from rag_retrieval.models.pair_batch import PairBatch

# pairs of 3, 5, 4, 2 tokens; the second and third begin with the 2 tokens of the pair before
BATCH = PairBatch(torch.arange(100, 114), None, [3, 5, 4, 2], [0, 2, 2, 0])


def test_without_sharing_the_row_is_the_pairs_one_after_another():
    packing = Packing(BATCH, causal=False)
    assert packing.segments == [Segment(3), Segment(5), Segment(4), Segment(2)]
    assert packing.select(BATCH.token_ids).tolist() == [list(range(100, 114))]
    assert packing.positions.tolist() == [0, 1, 2, 0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1]
    assert packing.read.tolist() == [0, 3, 8, 12], "an encoder is read at the first token"


def test_a_common_beginning_stands_in_the_row_once():
    packing = Packing(BATCH, causal=True)
    # 100 101 | 102 | (103 104 again) 105 106 107 | (108 109 again) 110 111 | 112 113
    assert packing.select(BATCH.token_ids).tolist() == [[100, 101, 102, 105, 106, 107, 110, 111, 112, 113]]
    assert packing.segments == [Segment(2), Segment(1, 0), Segment(3, 0), Segment(2, 0), Segment(2)]
    assert packing.positions.tolist() == [0, 1, 2, 2, 3, 4, 2, 3, 0, 1]
    assert packing.read.tolist() == [2, 5, 7, 9], "a decoder is read at the last token"


def test_a_kernel_is_told_the_keys_of_every_segment_with_the_shared_ones_repeated():
    bounds = Packing(BATCH, causal=True).kernel_bounds
    assert bounds.queries.tolist() == [0, 2, 3, 6, 8, 10]
    assert bounds.keys.tolist() == [0, 2, 5, 10, 14, 16]
    assert bounds.key_index.tolist() == [0, 1, 0, 1, 2, 0, 1, 3, 4, 5, 0, 1, 6, 7, 8, 9]
    assert (bounds.longest_query, bounds.longest_key) == (3, 5)
    assert bounds.queries.dtype == bounds.keys.dtype == torch.int32


def test_a_kernel_needs_no_index_where_nothing_is_shared():
    bounds = Packing(BATCH, causal=False).kernel_bounds
    assert bounds.key_index is None
    assert bounds.keys.tolist() == bounds.queries.tolist() == [0, 3, 8, 12, 14]


def test_reading_asks_with_one_token_of_each_pair_and_looks_at_all_of_its_keys():
    reading = Packing(BATCH, causal=True).reading
    assert reading.queries == [(1, 1), (1, 2), (1, 3), (1, 4)]  # the first segment is a beginning, not a pair
    bounds = reading.kernel_bounds
    assert bounds.queries.tolist() == [0, 1, 2, 3, 4]
    assert bounds.keys.tolist() == [0, 3, 8, 12, 14]
    assert bounds.key_index.tolist() == [0, 1, 2, 0, 1, 3, 4, 5, 0, 1, 6, 7, 8, 9]
    assert (bounds.longest_query, bounds.longest_key) == (1, 5)


def test_reading_leaves_the_layout_it_comes_from_alone():
    packing = Packing(BATCH, causal=False)
    whole = packing.kernel_bounds
    assert packing.reading.kernel_bounds.longest_query == 1
    assert packing.kernel_bounds is whole and whole.longest_query == 5
    assert packing.reading.kernel_bounds.key_index is None


@pytest.mark.parametrize("causal", [True, False])
def test_one_pair_is_one_segment(causal):
    packing = Packing(PairBatch(torch.tensor([5, 6]), None, [2], [0]), causal)
    assert packing.segments == [Segment(2)]
    assert packing.read.tolist() == [1 if causal else 0]
