import copy
import time

import numpy as np
import pytest

from rag_retrieval.serve.batching import Batcher
from rag_retrieval.serve.served_model import ServedModel
from rag_retrieval.serve.warm_up import LEAST_TOKENS, MOST_TOKENS, warm_up, warm_up_pairs


def batch_tokens_after(backend, tokens_per_second: float, batch_tokens: int | None) -> int:
    """Of a server whose model takes so long, and ten times as long the first time."""
    calls = []

    def slow(pairs, batch_size):
        calls.append(sum(map(len, pairs)))
        time.sleep(calls[-1] / tokens_per_second * (10 if len(calls) == 1 else 1))
        return np.zeros(len(pairs), np.float32)

    timed = copy.copy(backend)
    timed.score = slow
    model = ServedModel("tiny", timed, "truncate")
    with Batcher(model.score, MOST_TOKENS, lambda *counts: None) as batcher:
        warm_up(model, batcher, batch_tokens)
        return batcher.batch_tokens


def test_a_batch_is_what_the_model_scores_in_a_fifth_of_a_second_once_it_is_warm(backend):
    assert batch_tokens_after(backend, 5000, None) == pytest.approx(1000, rel=0.3)


def test_a_batch_that_was_measured_has_bounds_and_one_that_was_asked_for_has_none(backend):
    assert batch_tokens_after(backend, 1000, None) == LEAST_TOKENS
    assert batch_tokens_after(backend, 1e12, None) == MOST_TOKENS
    assert batch_tokens_after(backend, 1e12, 77) == 77


@pytest.mark.parametrize("long_document", ["truncate", "max_slice"])
def test_the_warm_up_holds_short_pairs_and_one_of_the_model_s_length(backend, long_document):
    lengths = sorted(len(pair) for pair in warm_up_pairs(ServedModel("tiny", backend, long_document)))
    assert lengths[0] < 16 and lengths[-1] == 64 and len(lengths) > 4
