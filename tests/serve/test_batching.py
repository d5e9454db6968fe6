import threading
from concurrent.futures import CancelledError, ThreadPoolExecutor

import numpy as np
import pytest
from serve_samples import numbered_pairs, wait_until

from rag_retrieval.serve.batching import Batcher


class Scorer:
    """The score of a pair is its first id. The first call waits for `gate`; batches: first ids of each call."""

    def __init__(self, failing: int | None = None):
        self.batches: list[list[int]] = []
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.failing = failing

    def __call__(self, pairs):
        ids = [pair.ids[0] for pair in pairs]
        self.entered.set()
        assert self.gate.wait(60)
        self.batches.append(ids)
        if self.failing in ids:
            raise ValueError("this pair breaks the model")
        return np.array(ids, np.float32)


def busy(batch_tokens: int, failing: int | None = None):
    """A batcher that is scoring pair 0 until `scorer.gate` is set, and what it counts."""
    scorer, counted = Scorer(failing), []
    batcher = Batcher(scorer, batch_tokens, lambda *counts: counted.append(counts))
    batcher.submit(numbered_pairs(0, 1))
    assert scorer.entered.wait(60)
    return batcher, scorer, counted


def test_what_gathers_while_the_model_is_busy_is_one_batch():
    batcher, scorer, counted = busy(batch_tokens=1000)
    futures = [batcher.submit(numbered_pairs(10 * number, 2)) for number in (1, 2, 3)]
    assert batcher.waiting_items() == 6
    scorer.gate.set()
    assert [future.result(60) for future in futures] == [[10, 11], [20, 21], [30, 31]]
    batcher.close()
    assert scorer.batches == [[0], [10, 11, 20, 21, 30, 31]]
    assert [(pairs, tokens) for pairs, tokens, _ in counted] == [(1, 10), (6, 60)]


def test_a_batch_holds_no_more_than_its_tokens_but_always_a_pair():
    batcher, scorer, _ = busy(batch_tokens=40)
    futures = [batcher.submit(numbered_pairs(100, 1, tokens=70)), batcher.submit(numbered_pairs(10, 6))]
    scorer.gate.set()
    assert futures[0].result(60) == [100]
    assert futures[1].result(60) == [10, 11, 12, 13, 14, 15]
    batcher.close()
    assert scorer.batches == [[0], [100], [10, 11, 12, 13], [14, 15]]


def test_a_large_request_does_not_hold_up_a_small_one_and_both_get_their_scores():
    batcher, scorer, _ = busy(batch_tokens=80)
    large, small = batcher.submit(numbered_pairs(1000, 40)), batcher.submit(numbered_pairs(10, 3))
    scorer.gate.set()
    assert small.result(60) == [10, 11, 12]
    assert large.result(60) == list(range(1000, 1040))
    batcher.close()
    # a turn is 20 tokens, two pairs: large, small, large, and the small one's last pair
    assert scorer.batches[1] == [1000, 1001, 10, 11, 1002, 1003, 12, 1004]
    assert max(map(len, scorer.batches)) == 8


def test_requests_that_fit_into_a_turn_are_served_in_the_order_in_which_they_came():
    batcher, scorer, _ = busy(batch_tokens=90)
    futures = [batcher.submit(numbered_pairs(10 * number, 2)) for number in range(1, 10)]
    scorer.gate.set()
    for future in futures:
        future.result(60)
    batcher.close()
    expected = [10 * number + place for number in range(1, 10) for place in (0, 1)]
    assert sum(scorer.batches[1:], []) == expected
    assert scorer.batches[1] == expected[:9]  # the fifth request is cut by the end of the batch and keeps its place


def test_a_cancelled_request_is_never_computed():
    batcher, scorer, _ = busy(batch_tokens=1000)
    gone, there = batcher.submit(numbered_pairs(10, 5)), batcher.submit(numbered_pairs(20, 2))
    assert gone.cancel()
    assert batcher.waiting_items() == 2
    scorer.gate.set()
    assert there.result(60) == [20, 21]
    batcher.close()
    assert scorer.batches == [[0], [20, 21]]
    with pytest.raises(CancelledError):
        gone.result()


def test_what_is_left_of_a_request_is_dropped_when_it_is_cancelled_half_way():
    scorer = Scorer()
    batcher = Batcher(scorer, 40, lambda *counts: None)
    future = batcher.submit(numbered_pairs(0, 100))
    assert scorer.entered.wait(60)
    assert future.cancel()
    scorer.gate.set()
    batcher.close()
    assert scorer.batches == [[0, 1, 2, 3]]


def test_an_error_reaches_the_request_that_causes_it_and_no_other():
    batcher, scorer, _ = busy(batch_tokens=1000, failing=20)
    futures = [batcher.submit(numbered_pairs(10 * number, 2)) for number in (1, 2, 3)]
    scorer.gate.set()
    assert futures[0].result(60) == [10, 11]
    with pytest.raises(ValueError, match="this pair breaks the model"):
        futures[1].result(60)
    assert futures[2].result(60) == [30, 31]
    assert batcher.submit(numbered_pairs(40, 1)).result(60) == [40]
    batcher.close()


def test_closing_finishes_what_waits_and_takes_nothing_more():
    batcher, scorer, _ = busy(batch_tokens=40)
    future = batcher.submit(numbered_pairs(10, 20))
    closing = threading.Thread(target=batcher.close)
    closing.start()
    scorer.gate.set()
    closing.join(60)
    assert future.result(0) == list(range(10, 30))
    assert not batcher.is_alive
    with pytest.raises(RuntimeError, match="closed"):
        batcher.submit(numbered_pairs(1, 1))


def test_a_request_without_pairs_is_answered_at_once():
    batcher, scorer, _ = busy(batch_tokens=40)
    assert batcher.submit([]).result(0) == []
    scorer.gate.set()
    batcher.close()


def test_the_expected_time_is_that_of_the_waiting_tokens_at_the_speed_so_far():
    batcher, scorer, counted = busy(batch_tokens=1000)
    assert batcher.expected_seconds() == 0
    scorer.gate.set()
    wait_until(lambda: counted)
    scorer.gate.clear()
    scorer.entered.clear()
    batcher.submit(numbered_pairs(0, 1))
    assert scorer.entered.wait(60)
    batcher.submit(numbered_pairs(1, 7))
    seconds_of_ten_tokens = counted[0][2]
    assert batcher.expected_seconds() == pytest.approx(7 * seconds_of_ten_tokens)
    scorer.gate.set()
    batcher.close()


def test_a_large_request_is_expected_to_give_way_after_its_turn():
    batcher, scorer, counted = busy(batch_tokens=40)  # a turn is 10 tokens, one item
    scorer.gate.set()
    wait_until(lambda: counted)
    scorer.gate.clear()
    scorer.entered.clear()
    batcher.submit(numbered_pairs(0, 1))
    assert scorer.entered.wait(60)
    for first in (100, 200, 300):
        batcher.submit(numbered_pairs(first, 50))
    seconds_of_a_turn = counted[0][2]
    assert batcher.expected_seconds() == pytest.approx(3 * seconds_of_a_turn)
    assert batcher.expected_seconds(200) == pytest.approx(3 * 20 * seconds_of_a_turn)
    assert batcher.expected_seconds(9999) == pytest.approx(3 * 50 * seconds_of_a_turn)
    scorer.gate.set()
    batcher.close()


def test_many_threads_get_their_own_scores():
    scorer = Scorer()
    scorer.gate.set()
    batcher = Batcher(scorer, 100, lambda *counts: None)
    generator = np.random.default_rng(0)
    sizes = generator.integers(1, 40, 300).tolist()
    with ThreadPoolExecutor(16) as pool:
        results = list(
            pool.map(lambda job: batcher.submit(numbered_pairs(1000 * job[0], job[1])).result(60), enumerate(sizes))
        )
    batcher.close()
    assert results == [
        list(range(1000 * number, 1000 * number + size)) for number, size in enumerate(sizes)
    ]
    assert sum(map(len, scorer.batches)) == sum(sizes)


# ---- what goes first ------------------------------------------------------------------------------------


def test_a_query_is_in_the_next_batch_and_that_batch_has_at_most_a_quarter_of_others():
    batcher, scorer, _ = busy(batch_tokens=80)  # a turn is 20 tokens, two pairs
    documents = batcher.submit(numbered_pairs(1000, 20))
    query = batcher.submit(numbered_pairs(10, 1), first=True)
    scorer.gate.set()
    assert query.result(60) == [10] and documents.result(60) == list(range(1000, 1020))
    batcher.close()
    assert scorer.batches[1:4] == [[10, 1000, 1001], list(range(1002, 1010)), list(range(1010, 1018))]


def test_documents_move_on_in_every_batch_however_many_queries_wait():
    batcher, scorer, _ = busy(batch_tokens=80)
    documents = batcher.submit(numbered_pairs(1000, 6))
    queries = [batcher.submit(numbered_pairs(10 * number, 1), first=True) for number in range(1, 20)]
    scorer.gate.set()
    for number, query in enumerate(queries, 1):
        assert query.result(60) == [10 * number]
    assert documents.result(60) == list(range(1000, 1006))
    batcher.close()
    # six of eight pairs are queries' as long as documents wait
    assert scorer.batches[1:4] == [
        [10, 20, 30, 40, 50, 60, 1000, 1001],
        [70, 80, 90, 100, 110, 120, 1002, 1003],
        [130, 140, 150, 160, 170, 180, 1004, 1005],
    ]
    assert scorer.batches[4] == [190]


def test_queries_among_themselves_take_turns():
    batcher, scorer, _ = busy(batch_tokens=80)
    many, one = batcher.submit(numbered_pairs(1000, 20), first=True), batcher.submit(numbered_pairs(10, 1), first=True)
    scorer.gate.set()
    assert one.result(60) == [10] and many.result(60) == list(range(1000, 1020))
    batcher.close()
    assert scorer.batches[1][:3] == [1000, 1001, 10]


def test_a_query_that_is_cancelled_is_never_computed():
    batcher, scorer, _ = busy(batch_tokens=80)
    gone = batcher.submit(numbered_pairs(10, 3), first=True)
    assert batcher.waiting_items() == 3 and gone.cancel() and batcher.waiting_items() == 0
    scorer.gate.set()
    batcher.close()
    assert scorer.batches == [[0]]


def test_a_query_waits_for_queries_alone_and_documents_for_all_of_them():
    batcher, scorer, counted = busy(batch_tokens=40)  # a turn is 10 tokens, one item
    scorer.gate.set()
    wait_until(lambda: counted)
    scorer.gate.clear()
    scorer.entered.clear()
    batcher.submit(numbered_pairs(0, 1))
    assert scorer.entered.wait(60)
    batcher.submit(numbered_pairs(100, 50))
    for first in (10, 20, 30):
        batcher.submit(numbered_pairs(first, 2), first=True)
    second = counted[0][2] / 10  # of a token
    assert batcher.expected_seconds(10, first=True) == pytest.approx(3 * 10 * second)
    assert batcher.expected_seconds(10) == pytest.approx((3 * 20 + 10) * second)
    scorer.gate.set()
    batcher.close()


def test_results_are_never_put_into_words():
    """Those of an embedder are arrays, whose words cost more than to compute them."""

    class Result:
        shown = 0

        def __repr__(self):
            Result.shown += 1
            return "a result"

    with Batcher(lambda pairs: [Result() for _ in pairs], 1000, lambda *counts: None) as batcher:
        results = batcher.submit(numbered_pairs(1, 2)).result(60)
    assert len(results) == 2 and Result.shown == 0
