"""Padded batches laid out by hand, and plans that give scores back in input order."""

import numpy as np
import pytest

from rag_retrieval.infer.padded_scoring import padded_inputs, score_padded
from rag_retrieval.models.pair_encoding import EncodedPair

NAMES = ("input_ids", "attention_mask", "token_type_ids")


def pair(*ids: int) -> EncodedPair:
    return EncodedPair(np.array(ids, np.int32), np.ones(len(ids), np.int32), truncated=False, document_start=1)


def test_pairs_are_padded_at_the_right():
    inputs = padded_inputs([pair(5, 6, 7), pair(8)], NAMES, pad_token_id=9)
    assert inputs["input_ids"].tolist() == [[5, 6, 7], [8, 9, 9]]
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert inputs["token_type_ids"].tolist() == [[1, 1, 1], [1, 0, 0]]
    assert {values.dtype for values in inputs.values()} == {np.dtype(np.int64)}
    assert list(padded_inputs([pair(1)], NAMES[:2], 0)) == list(NAMES[:2])


@pytest.mark.parametrize(("batch_size", "max_tokens"), [(1, 100), (3, 100), (256, 12), (256, 1), (2, 7)])
def test_scores_come_in_input_order_and_no_forward_is_beyond_its_bounds(batch_size, max_tokens):
    pairs = [pair(*range(100 * place, 100 * place + length)) for place, length in enumerate((3, 1, 6, 2, 6, 1, 4))]
    shapes = []

    def run(inputs):
        shapes.append(inputs["input_ids"].shape)
        return inputs["input_ids"][:, 0].astype(np.float32)

    scores = score_padded(run, pairs, NAMES, 0, batch_size, max_tokens)
    assert scores.tolist() == [0, 100, 200, 300, 400, 500, 600] and scores.dtype == np.float32
    assert sum(rows for rows, _ in shapes) == 7
    assert all(rows <= batch_size and (rows * longest <= max_tokens or rows == 1) for rows, longest in shapes)
    assert [longest for _, longest in shapes] == sorted((longest for _, longest in shapes), reverse=True)


def test_no_pairs_give_no_scores_and_no_forward():
    scores = score_padded(lambda inputs: pytest.fail("a forward of nothing"), [], NAMES, 0, 8, 100)
    assert scores.shape == (0,) and scores.dtype == np.float32
