"""Threads for pieces of work, and how bodies become requests."""

import asyncio
import threading

import pytest
from pydantic import BaseModel
from serve_samples import wait_until

from rag_retrieval.serve.endpoints import PieceThreads, Work, check_characters, parse_json, pieces_of
from rag_retrieval.serve.http import Admission, RequestError

EXPECTED = {"input": "a list of strings"}


class Held:
    """One thread whose first piece waits for `gate`; done: names of the pieces, in their order."""

    def __init__(self):
        self.threads = PieceThreads(1, "test")
        self.gate, self.entered, self.done = threading.Event(), threading.Event(), []

    def hold(self):
        self.entered.set()
        assert self.gate.wait(60)

    async def run(self, *pieces: tuple[str, bool]) -> None:
        """Hands in all of (name, first) while the thread is held, then lets it go."""
        held = asyncio.create_task(self.threads.run(self.hold))
        await asyncio.to_thread(self.entered.wait, 60)
        tasks = [asyncio.create_task(self.threads.run(self.done.append, name, first=first)) for name, first in pieces]
        await asyncio.sleep(0)
        self.gate.set()
        await asyncio.gather(held, *tasks)
        self.threads.close()


def test_pieces_that_go_first_pass_others_of_which_every_fourth_is_worked_on():
    held = Held()
    asyncio.run(held.run(("a", False), ("b", False), ("c", False), *[(f"q{number}", True) for number in range(7)]))
    # the held piece was one of the others, so three queries come before the next of them
    assert held.done == ["q0", "q1", "q2", "a", "q3", "q4", "q5", "b", "q6", "c"]


def test_an_error_reaches_the_one_who_asked_and_the_thread_lives_on():
    threads = PieceThreads(1, "test")

    async def two():
        with pytest.raises(ZeroDivisionError):
            await threads.run(lambda: 1 // 0)
        return await threads.run(lambda: 7)

    assert asyncio.run(two()) == 7
    threads.close()


def test_a_cancelled_piece_is_left_out_and_its_cost_too():
    held = Held()

    async def cancel():
        first = asyncio.create_task(held.threads.run(held.hold))
        await asyncio.to_thread(held.entered.wait, 60)
        waiting = asyncio.create_task(held.threads.run(held.done.append, "never", cost=1e9))
        await asyncio.sleep(0)
        waiting.cancel()
        with pytest.raises(asyncio.CancelledError):
            await waiting
        held.gate.set()
        await first
        await held.threads.run(held.done.append, "next", cost=1)

    asyncio.run(cancel())
    assert held.done == ["next"]
    wait_until(lambda: held.threads.expected_seconds() == 0)
    held.threads.close()


def test_the_expected_wait_is_the_cost_of_what_goes_before_at_the_speed_so_far(monkeypatch):
    clock = iter([0.0, 2.0])
    monkeypatch.setattr("rag_retrieval.serve.endpoints.time.perf_counter", lambda: next(clock, 2.0))
    held = Held()

    async def measure() -> tuple[float, float]:
        await held.threads.run(lambda: None, cost=10)  # 0.2 s for 1, of which a tenth counts at once
        first = asyncio.create_task(held.threads.run(held.hold))
        await asyncio.to_thread(held.entered.wait, 60)
        waiting = [asyncio.create_task(held.threads.run(held.done.append, cost, cost=cost)) for cost in (30, 20)]
        await asyncio.sleep(0)
        query = asyncio.create_task(held.threads.run(held.done.append, "query", cost=5, first=True))
        await asyncio.sleep(0)
        expected = held.threads.expected_seconds(), held.threads.expected_seconds(first=True)
        held.gate.set()
        await asyncio.gather(first, *waiting, query)
        return expected

    assert asyncio.run(measure()) == pytest.approx((55 * 0.02, 5 * 0.02))
    held.threads.close()


def test_other_work_is_refused_where_it_would_wait_too_long(monkeypatch):
    threads = PieceThreads(1, "test")
    work = Work("id", threads, threads, Admission(1, 1, timeout=30))
    assert asyncio.run(work.run(lambda one: one + 1, 1)) == 2
    monkeypatch.setattr(threads, "expected_seconds", lambda first: 16)
    with pytest.raises(RequestError) as caught:
        asyncio.run(work.run(lambda: 1))
    assert caught.value.status == 429
    threads.close()


def test_pieces_are_bounded_and_hold_each_text_once():
    texts = ["a" * 30_000, "b" * 30_000, "c" * 120_000, "d", "e"]
    assert [[text[0] for text in piece] for piece in pieces_of(texts)] == [["a"], ["b"], ["c"], ["d", "e"]]
    assert list(pieces_of([])) == []


class Input(BaseModel):
    input: str | list[str]


def test_a_body_of_many_lists_is_refused_before_it_is_parsed():
    for body in (b"[" * 2000, b'{"input": [' + b"[]," * 2000 + b"[]]}"):
        with pytest.raises(RequestError, match="too many lists and objects") as caught:
            parse_json(body, Input, EXPECTED)
        assert caught.value.status == 422
    with pytest.raises(RequestError, match="no JSON") as caught:
        parse_json(b"{", Input, EXPECTED)
    assert caught.value.status == 400


def test_a_text_that_is_none_is_named_with_its_place():
    with pytest.raises(RequestError, match=r"input\[1\]: not as expected; input takes a list of strings"):
        parse_json(b'{"input": ["a", 1]}', Input, EXPECTED)
    assert parse_json('{"input": "é"}'.encode(), Input, EXPECTED).input == "é"


def test_a_text_of_too_many_characters_is_named():
    check_characters([("query", "abc")], 3)
    with pytest.raises(RequestError, match=r"inputs\[1\]: found 4 characters, at most 3"):
        check_characters([("inputs[0]", "abc"), ("inputs[1]", "abcd")], 3)
