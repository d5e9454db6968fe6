"""Batches of pairs: one after another, padded at the right only where a model needs a rectangle."""

import pytest
import torch

from rag_retrieval.models.pair_batch import make_batch, padded_inputs
from rag_retrieval.models.pair_encoding import EncodedPair

SHORT = EncodedPair([7, 8], [0, 1], truncated=False, document_start=1)
LONG = EncodedPair([4, 5, 6, 9], [0, 0, 1, 1], truncated=True, document_start=2)


def test_pairs_lie_one_after_another_with_their_lengths():
    batch = make_batch([SHORT, LONG])
    assert batch.token_ids.tolist() == [7, 8, 4, 5, 6, 9]
    assert batch.token_types.tolist() == [0, 1, 0, 0, 1, 1]
    assert (batch.lengths, len(batch)) == ([2, 4], 2)
    assert batch.token_ids.dtype == torch.int64


def test_a_pair_shares_what_stands_before_its_document_with_the_pair_before_it():
    pairs = [
        EncodedPair(ids, None, False, document_start)
        for ids, document_start in (([1, 2, 3], 2), ([1, 2, 4, 5], 2), ([1, 2, 3], 1), ([1, 9], 1), ([8, 9], 1))
    ]
    # the third begins alike, but its query is shorter; the last begins with another token
    assert make_batch(pairs).shared == [0, 2, 0, 1, 0]


def test_padding_stands_at_the_right_with_mask_and_segment_zero():
    inputs = padded_inputs(make_batch([SHORT, LONG, SHORT]), pad_token_id=3)
    assert inputs["input_ids"].tolist() == [[7, 8, 3, 3], [4, 5, 6, 9], [7, 8, 3, 3]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 0, 0]]
    assert inputs["token_type_ids"].tolist() == [[0, 1, 0, 0], [0, 0, 1, 1], [0, 1, 0, 0]]


def test_families_without_segments_get_no_token_types():
    pair = EncodedPair([7, 8], None, truncated=False, document_start=1)
    batch = make_batch([pair])
    assert batch.token_types is None
    assert sorted(padded_inputs(batch, 0)) == ["attention_mask", "input_ids"]
    assert batch.to(torch.device("cpu")).token_types is None


def test_a_real_token_equal_to_the_pad_token_is_not_masked():
    pairs = [EncodedPair([3, 3], None, False, 1), EncodedPair([1, 2, 3], None, False, 1)]
    inputs = padded_inputs(make_batch(pairs), 3)
    assert inputs["attention_mask"].tolist() == [[1, 1, 0], [1, 1, 1]]


def test_moving_a_batch_keeps_what_it_holds():
    moved = make_batch([SHORT, LONG]).to(torch.device("meta"))
    assert {moved.token_ids.device.type, moved.token_types.device.type} == {"meta"}
    assert (moved.lengths, moved.shared) == ([2, 4], [0, 0])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="pinned memory needs a GPU")
def test_a_pinned_batch_holds_the_same():
    pinned = make_batch([SHORT, LONG]).pin_memory()
    assert pinned.token_ids.is_pinned() and pinned.token_ids.tolist() == [7, 8, 4, 5, 6, 9]


def test_an_empty_batch_is_our_own_mistake():
    with pytest.raises(AssertionError, match="at least one pair"):
        make_batch([])
