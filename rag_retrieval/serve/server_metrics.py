"""What Prometheus can ask: requests by status, their seconds, the queue, batches, pairs and tokens.

What a reader would get wrong: a path that is none of ours is counted as `other`; else a client could make as many
time series as it can think of paths.
"""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
PAIRS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class ServerMetrics:
    """The series of one server, in a registry of their own."""

    def __init__(self):
        self.registry = CollectorRegistry()
        of_here = {"namespace": "rag_retrieval", "registry": self.registry}
        self.requests = Counter("requests", "Requests by path and status.", ("path", "status"), **of_here)
        self.request_seconds = Histogram(
            "request_seconds", "From a rerank request's first byte to its answer.", buckets=SECONDS, **of_here
        )
        self.pairs = Counter("pairs", "Pairs scored.", **of_here)
        self.tokens = Counter("tokens", "Tokens scored.", **of_here)
        self.truncated = Counter("truncated_pairs", "Pairs that were cut to the model's length.", **of_here)
        self.batch_pairs = Histogram("batch_pairs", "Pairs scored together.", buckets=PAIRS, **of_here)
        self.batch_seconds = Histogram("batch_seconds", "Time of one batch.", buckets=SECONDS, **of_here)
        self.requests_inside = Gauge("requests_inside", "Requests that were taken and not answered.", **of_here)
        self.queue_pairs = Gauge("queue_pairs", "Pairs that wait for a batch.", **of_here)

    def watch(self, requests_inside: Callable[[], int], queue_pairs: Callable[[], int]) -> None:
        """Where the two gauges are read from."""
        self.requests_inside.set_function(requests_inside)
        self.queue_pairs.set_function(queue_pairs)

    def count_batch(self, pairs: int, tokens: int, seconds: float) -> None:
        self.pairs.inc(pairs)
        self.tokens.inc(tokens)
        self.batch_pairs.observe(pairs)
        self.batch_seconds.observe(seconds)
