"""One thread that owns the model and scores the pairs of all waiting requests together.

There is no timer: whatever has gathered while the model was busy is the next batch, and an idle model begins at once.
What a reader would get wrong: requests take turns. In one turn a request gives at most a quarter of a batch, and what
is left of it goes to the end of the line. So a request of a thousand documents cannot hold up one of ten, and requests
that fit into a quarter of a batch are served in the order in which they came.
"""

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, field

import numpy as np

from rag_retrieval.models.pair_encoding import EncodedPair

TURNS = 4  # requests of one batch at least, where that many wait
MEMORY = 0.9  # of the speed so far, kept at each batch: the first ones are slow and must be forgotten

Score = Callable[[list[EncodedPair]], np.ndarray]


@dataclass(eq=False)
class _Job:
    """The pairs of a request. taken, done: pairs that went into batches, and pairs that have scores. tokens: of the
    pairs that are not taken."""

    pairs: Sequence[EncodedPair]
    future: "Future[np.ndarray]" = field(default_factory=Future)
    taken: int = 0
    done: int = 0
    tokens: int = field(init=False)
    scores: np.ndarray = field(init=False)

    def __post_init__(self):
        self.tokens = sum(map(len, self.pairs))
        self.scores = np.empty(len(self.pairs), np.float32)

    @property
    def next_tokens(self) -> int:
        return len(self.pairs[self.taken])

    def take(self, room: int) -> "_Part":
        """The next pairs of at most `room` tokens, at least one."""
        start, tokens = self.taken, 0
        while self.taken < len(self.pairs) and (not tokens or tokens + self.next_tokens <= room):
            tokens += self.next_tokens
            self.taken += 1
        self.tokens -= tokens
        return _Part(self, start, self.taken, tokens)

    def finish(self, result: np.ndarray | Exception) -> None:
        with suppress(InvalidStateError):  # cancelled meanwhile
            if isinstance(result, Exception):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)


@dataclass(frozen=True)
class _Part:
    """Pairs `start` to `stop` of a job, and their tokens."""

    job: _Job
    start: int
    stop: int
    tokens: int

    @property
    def pairs(self) -> Sequence[EncodedPair]:
        return self.job.pairs[self.start : self.stop]

    def put(self, scores: np.ndarray) -> None:
        job = self.job
        job.scores[self.start : self.stop] = scores
        job.done += self.stop - self.start
        if job.done == len(job.pairs):
            job.finish(job.scores)


class Batcher:
    """score: pairs to their scores, [pairs] in their order; called from one thread, that of this object.
    batch_tokens: tokens of one call of it at most, where one pair has not more; may be changed at any time.
    on_batch: called after each with its pairs, its tokens and its seconds."""

    def __init__(self, score: Score, batch_tokens: int, on_batch: Callable[[int, int, float], None]):
        self._score = score
        self.batch_tokens = batch_tokens
        self._on_batch = on_batch
        self._waiting: deque[_Job] = deque()
        self._changed = threading.Condition()
        self._closing = False
        self._scored_tokens = 0.0
        self._busy_seconds = 0.0
        self._thread = threading.Thread(target=self._run, name="rerank-batches", daemon=True)
        self._thread.start()

    def submit(self, pairs: Sequence[EncodedPair]) -> "Future[np.ndarray]":
        """The scores to come: [pairs], float32. Cancel the future, and what was not computed yet is left out."""
        job = _Job(pairs)
        if not pairs:
            job.finish(job.scores)
            return job.future
        with self._changed:
            if self._closing:
                raise RuntimeError("the batcher is closed")
            self._waiting.append(job)
            self._changed.notify()
        job.future.add_done_callback(lambda _: self._forget(job))
        return job.future

    @property
    def is_alive(self) -> bool:
        return self._thread.is_alive()

    def waiting_pairs(self) -> int:
        """Pairs that are in no batch yet."""
        with self._changed:
            return sum(len(job.pairs) - job.taken for job in self._waiting)

    def expected_seconds(self) -> float:
        """How long the waiting pairs will take at the speed of the last batches; 0 before the first."""
        with self._changed:
            return sum(job.tokens for job in self._waiting) * self._busy_seconds / max(self._scored_tokens, 1)

    def __enter__(self) -> "Batcher":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def close(self) -> None:
        """Score what waits, then end the thread."""
        with self._changed:
            self._closing = True
            self._changed.notify()
        self._thread.join()

    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closing)
                if not self._waiting:
                    return
                parts = self._take()
            self._score_parts(parts)

    def _forget(self, job: _Job) -> None:
        """Drop what waits of a job that is done: its client has gone, or another part of it failed."""
        with self._changed, suppress(ValueError):  # nothing of it waits
            self._waiting.remove(job)

    def _take(self) -> list[_Part]:
        """The next batch, from the head of the line."""
        parts: list[_Part] = []
        turn, room = self.batch_tokens // TURNS, self.batch_tokens
        while self._waiting and (not parts or self._waiting[0].next_tokens <= room):
            job = self._waiting.popleft()
            parts.append(job.take(min(room, turn)))
            turn_was_whole = room >= turn
            room -= parts[-1].tokens
            if job.tokens and turn_was_whole:
                self._waiting.append(job)
            elif job.tokens:  # it goes on where it stands, else a small request could lose its place
                self._waiting.appendleft(job)
        return parts

    def _score_parts(self, parts: list[_Part]) -> None:
        """Where several requests fail together each is scored alone, so that one alone can break itself."""
        pairs = [pair for part in parts for pair in part.pairs]
        started = time.perf_counter()
        try:
            scores = self._score(pairs)
        except Exception as error:  # of the model: it is told to the requests, and the thread lives on
            if len(parts) == 1:
                parts[0].job.finish(error)
                return
            for part in parts:
                self._score_parts([part])
            return
        self._account(len(pairs), sum(part.tokens for part in parts), time.perf_counter() - started)
        self._hand_out(parts, scores)

    @staticmethod
    def _hand_out(parts: list[_Part], scores: np.ndarray) -> None:
        start = 0
        for part in parts:
            count = part.stop - part.start
            part.put(scores[start : start + count])
            start += count

    def _account(self, pairs: int, tokens: int, seconds: float) -> None:
        with self._changed:
            self._scored_tokens = MEMORY * self._scored_tokens + tokens
            self._busy_seconds = MEMORY * self._busy_seconds + seconds
        self._on_batch(pairs, tokens, seconds)
