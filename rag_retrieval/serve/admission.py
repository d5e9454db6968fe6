"""Who may come in: bounds on requests, on documents and on the wait, and nobody while the server stops.

What a reader would get wrong: there is no lock, for everything here runs on the event loop. A request is counted
before its body is read, so that the bodies in memory are bounded too.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rag_retrieval.serve.refusal import Refusal

LONGEST_RETRY = 60  # seconds
LONGEST_WAIT = 0.5  # of the time-out: a request that would end by it is better refused than computed in vain


class Admission:
    """requests, pairs: inside at present. expected_seconds: how long what waits will take. timeout: seconds."""

    def __init__(self, max_requests: int, max_pairs: int, timeout: float, expected_seconds: Callable[[], float]):
        self.max_requests = max_requests
        self.max_pairs = max_pairs
        self.longest_wait = LONGEST_WAIT * timeout
        self.expected_seconds = expected_seconds
        self.requests = 0
        self.pairs = 0
        self.stopping = False

    @contextmanager
    def request(self) -> Iterator[None]:
        """Raises Refusal with 503 or 429."""
        if self.stopping:
            raise Refusal(503, "the server is stopping; ask another one", retry_after=1)
        if self.requests >= self.max_requests or self.expected_seconds() > self.longest_wait:
            raise self._full(f"{self.requests} requests")
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    @contextmanager
    def documents(self, count: int) -> Iterator[None]:
        """Raises Refusal with 429."""
        if self.pairs + count > self.max_pairs:
            raise self._full(f"{self.pairs} documents")
        self.pairs += count
        try:
            yield
        finally:
            self.pairs -= count

    def _full(self, found: str) -> Refusal:
        seconds = min(max(math.ceil(self.expected_seconds()), 1), LONGEST_RETRY)
        return Refusal(429, f"the queue is full ({found}); try again after {seconds} s", retry_after=seconds)
