"""One thread that owns the model and computes the items of all waiting requests together.

There is no timer: what has arrived while the model was busy is the next batch, and an idle model begins at once.
Requests take turns. In one turn a request gives at most a quarter of a batch, and the rest of it goes to the end of the
line. So a request of a thousand documents cannot hold up one of ten, and requests that fit into a quarter of a
batch are served in the order in which they came.

There are two lines. What goes `first`, such as the query for which a person waits, is in the very next batch. Besides,
that batch has at most a quarter of the others' items: it is short, and they move on all the same.

An item is anything whose length is its tokens; what the model gives for it may be of any kind.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence, Sized
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

TURNS = 4  # requests of one batch at least, where that many wait
DECAY = 0.9  # of the weight of earlier batches in the measured speed: the first ones are slow

Compute = Callable[[list[Any]], Sequence[Any]]


@dataclass(eq=False)
class _Job:
    """The items of a request. first: in which line it waits. taken, done: items that went into batches, and items that
    have results. tokens: of the items that are not taken."""

    items: Sequence[Sized]
    first: bool
    future: "Future[list[Any]]" = field(default_factory=Future)
    taken: int = 0
    done: int = 0
    tokens: int = field(init=False)
    results: list[Any] = field(init=False)

    def __post_init__(self):
        self.tokens = sum(map(len, self.items))
        self.results = [None] * len(self.items)

    @property
    def next_tokens(self) -> int:
        return len(self.items[self.taken])

    def take(self, room: int) -> "_Part":
        """The next items of at most `room` tokens, at least one."""
        start, tokens = self.taken, 0
        while self.taken < len(self.items) and (not tokens or tokens + self.next_tokens <= room):
            tokens += self.next_tokens
            self.taken += 1
        self.tokens -= tokens
        return _Part(self, start, self.taken, tokens)

    def put(self, start: int, results: Sequence[Any]) -> None:
        self.results[start : start + len(results)] = results
        self.done += len(results)
        if self.done == len(self.items):
            self.finish(self.results)

    def finish(self, result: list[Any] | Exception) -> None:
        with suppress(InvalidStateError):  # cancelled meanwhile
            if isinstance(result, Exception):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)


@dataclass(frozen=True)
class _Part:
    """Items `start` to `stop` of a job, and their tokens."""

    job: _Job
    start: int
    stop: int
    tokens: int


class Batcher:
    """compute: items to their results, in their order; called from one thread, that of this object.
    batch_tokens: the most tokens of one call, unless the first item of a line has more; may be changed at any time.
    on_batch: called after each batch with the number of its items, its tokens and its seconds."""

    def __init__(self, compute: Compute, batch_tokens: int, on_batch: Callable[[int, int, float], None]):
        self._compute = compute
        self.batch_tokens = batch_tokens
        self._on_batch = on_batch
        self._first: deque[_Job] = deque()
        self._others: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._computed_tokens = 0.0
        self._busy_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="serve-batches", daemon=True)
        self._thread.start()

    def submit(self, items: Sequence[Sized], first: bool = False) -> "Future[list[Any]]":
        """The results to come, one for each item. Cancel the future, and what was not computed yet is left out."""
        job = _Job(items, first)
        if not items:
            job.finish([])
            return job.future
        with self._changed:
            if self._closing:
                raise RuntimeError("the batcher is closed")
            self._line(job).append(job)
            self._changed.notify()
        job.future.add_done_callback(lambda _: self._forget(job))
        return job.future

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def waiting_items(self) -> int:
        """Items that are in no batch yet."""
        with self._changed:
            return sum(len(job.items) - job.taken for job in (*self._first, *self._others))

    def expected_seconds(self, tokens: int | None = None, first: bool = False) -> float:
        """How long a request of so many tokens waits for others while it takes its turns; None: for its first turn.
        At the speed of the last batches; 0 before the first."""
        tokens = self.batch_tokens // TURNS if tokens is None else tokens
        with self._changed:
            if first:
                before = sum(min(job.tokens, tokens) for job in self._first)
            else:
                before = sum(job.tokens for job in self._first) + sum(min(job.tokens, tokens) for job in self._others)
            return before * self._busy_seconds / max(self._computed_tokens, 1)

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Compute what waits, then end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._first or self._others or self._closing)
                if not self._first and not self._others:
                    return
                parts = self._take()
            self._compute_parts(parts)

    def _line(self, job: _Job) -> deque[_Job]:
        return self._first if job.first else self._others

    def _forget(self, job: _Job) -> None:
        """Drop what waits of a job that is done: its client has gone, or another part of it failed."""
        line = self._line(job)
        with self._changed:
            if job in line:  # what `remove` raises of one that is not there has all its results in the message
                line.remove(job)

    def _take(self) -> list[_Part]:
        """The next batch."""
        turn = self.batch_tokens // TURNS
        if not self._first:
            return self._take_from(self._others, self.batch_tokens)
        first = self._take_from(self._first, self.batch_tokens - turn if self._others else self.batch_tokens)
        return first + self._take_from(self._others, turn)

    def _take_from(self, line: deque[_Job], room: int) -> list[_Part]:
        """From the head of a line, at most `room` tokens, at least an item where there is one."""
        parts: list[_Part] = []
        turn = self.batch_tokens // TURNS
        while line and (not parts or line[0].next_tokens <= room):
            job = line.popleft()
            parts.append(job.take(min(room, turn)))
            turn_was_whole = room >= turn
            room -= parts[-1].tokens
            if job.tokens and turn_was_whole:
                line.append(job)
            elif job.tokens:  # it stays first in line, else a small request could lose its place
                line.appendleft(job)
        return parts

    def _compute_parts(self, parts: list[_Part]) -> None:
        """Where several requests fail together each is computed alone, so that one alone can break itself."""
        items = [item for part in parts for item in part.job.items[part.start : part.stop]]
        started = time.perf_counter()
        try:
            results = self._compute(items)
        except Exception as error:  # of the model: the requests get it, and the thread lives on
            if len(parts) == 1:
                parts[0].job.finish(error)
                return
            for part in parts:
                self._compute_parts([part])
            return
        tokens, seconds = sum(part.tokens for part in parts), time.perf_counter() - started
        with self._changed:
            self._computed_tokens = DECAY * self._computed_tokens + tokens
            self._busy_seconds = DECAY * self._busy_seconds + seconds
        self._on_batch(len(items), tokens, seconds)
        start = 0
        for part in parts:
            part.job.put(part.start, results[start : start + part.stop - part.start])
            start += part.stop - part.start
