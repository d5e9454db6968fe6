"""HTTP at the edge of the application: errors, the bearer token, bodies, how many requests come in, and metrics.

Nothing here needs a lock: all of it runs on the event loop.
"""

import asyncio
import hmac
import math
import os
from collections.abc import Callable, Coroutine, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.multiprocess import MultiProcessCollector
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse

from rag_retrieval.serve.batching import Batcher
from rag_retrieval.serve.config import TOKEN_VARIABLE

Result = TypeVar("Result")

ERROR_TYPES = {
    400: "malformed",
    401: "unauthorized",
    404: "not_found",
    405: "method_not_allowed",
    408: "too_slow",
    413: "too_large",
    415: "unsupported_media_type",
    422: "validation",
    424: "backend",
    429: "overloaded",
    500: "internal",
    503: "stopping",
    504: "timeout",
}
METRICS_VARIABLE = "PROMETHEUS_MULTIPROC_DIR"  # of prometheus_client
CLIENT_GONE = 499  # in the metrics alone: the client has left
DRAIN_SECONDS = 5
LONGEST_RETRY = 60  # seconds
LONGEST_WAIT = 0.5  # of the time-out: a request that would end by it is better refused than computed in vain
SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
ITEMS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class RequestError(Exception):
    """Answered with `status`, a key of ERROR_TYPES. retry_after: seconds, for the header of that name."""

    def __init__(self, status: int, message: str, retry_after: int | None = None):
        super().__init__(message)
        self.status = status
        self.message = message
        self.retry_after = retry_after


def error_body(error: RequestError, request_id: str) -> dict[str, Any]:
    """`message` and `error` are the same text: clients of Cohere show the first, those of text-embeddings-inference
    the second."""
    kind = ERROR_TYPES[error.status]
    return {"message": error.message, "error": error.message, "error_type": kind, "id": request_id}


def error_response(
    error: RequestError, request_id: str, body_of: Callable[[RequestError, str], dict[str, Any]]
) -> JSONResponse:
    """body_of: as `error_body`."""
    headers = {}
    if error.retry_after is not None:
        headers["Retry-After"] = str(error.retry_after)
    if error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(body_of(error, request_id), error.status, headers)


# ---- the token ------------------------------------------------------------------------------------------


def read_token(token_file: str | None) -> bytes | None:
    """The token of the file, else of the environment; None where there is neither. Raises ValueError for one that no
    header can carry (empty, spaces or line breaks inside, beyond ASCII), and OSError for an unreadable file."""
    if token_file is not None:
        place, token = token_file, Path(token_file).read_bytes().strip()
    elif TOKEN_VARIABLE in os.environ:
        place, token = TOKEN_VARIABLE, os.environ[TOKEN_VARIABLE].strip().encode()
    else:
        return None
    if not token or not all(33 <= byte <= 126 for byte in token):
        raise ValueError(
            f"{place}: expected one token of visible ASCII characters without spaces, found "
            f"{'other characters' if token else 'nothing'}; write one, such as the output of `openssl rand -hex 32`"
        )
    return token


def is_authorized(header: str | None, token: bytes | None) -> bool:
    """header: the value of Authorization, None where the request has none. The scheme's case does not count."""
    if token is None:
        return True
    scheme, _, given = (header or "").partition(" ")
    # takes the same time for all tokens; it refuses text beyond ASCII, so bytes are compared
    same = hmac.compare_digest(given.strip().encode("utf-8", "surrogateescape"), token)
    return same and scheme.lower() == "bearer"


# ---- bodies ---------------------------------------------------------------------------------------------


def check_content(request: Request) -> None:
    """Raises RequestError (415)."""
    media_type = request.headers.get("content-type", "application/json").partition(";")[0].strip().lower()
    if media_type != "application/json":
        raise RequestError(415, f"Content-Type: expected application/json, found {media_type!r:.100}")
    encoding = request.headers.get("content-encoding", "identity").strip().lower()
    if encoding != "identity":
        raise RequestError(415, f"Content-Encoding: found {encoding!r:.100}; send the body uncompressed")


async def read_body(request: Request, most_bytes: int, deadline: float) -> bytes:
    """deadline: on the clock of the event loop. Raises RequestError (408, 413), and ClientDisconnect."""
    too_large = RequestError(413, f"the body is larger than {most_bytes} bytes; send fewer or shorter documents")
    if content_length(request) > most_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout_at(deadline):
            async for chunk in request.stream():
                body += chunk
                if len(body) > most_bytes:  # Content-Length may lie or be missing
                    raise too_large
    except TimeoutError:
        raise RequestError(408, f"the body did not arrive in time; {len(body)} bytes came") from None
    return bytes(body)


def content_length(request: Request) -> int:
    """0 where the request does not say."""
    value = request.headers.get("content-length", "")
    return int(value) if value.isdecimal() and len(value) < 20 else 0


async def read_to_the_end(request: Request, most_bytes: int) -> bool:
    """Take the rest of the body of a refused request, so that its client reads the answer and can keep the connection.
    False where it is larger or slower than is worth it: the connection has to be closed then."""
    if content_length(request) > most_bytes or "expect" in request.headers:
        return False
    left = most_bytes
    try:
        async with asyncio.timeout(DRAIN_SECONDS):
            while left >= 0:
                message = await request.receive()
                left -= len(message.get("body", b""))
                if not message.get("more_body", False):
                    return True
    except TimeoutError:
        pass
    return False


async def while_connected(request: Request, work: Coroutine[Any, Any, Result], deadline: float) -> Result:
    """What `work` gives. It is cancelled when the client leaves (raises ClientDisconnect) and at the deadline (raises
    RequestError, 504). The body must have been read."""

    async def disconnect() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    left = deadline - asyncio.get_running_loop().time()
    task, gone = asyncio.create_task(work), asyncio.create_task(disconnect())
    try:
        await asyncio.wait((task, gone), timeout=left, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        if gone.done():
            raise ClientDisconnect
        raise RequestError(504, "no answer in time; the server is busy or the request is large: try again or send less")
    finally:
        task.cancel()
        gone.cancel()


# ---- bounds on what is inside ---------------------------------------------------------------------------


class Admission:
    """Bounds on requests, documents and the wait; nothing is admitted while the server stops.

    A request is counted before its body is read, so that the bodies in memory are bounded too. requests, documents:
    inside at present. timeout: seconds.
    """

    def __init__(self, max_requests: int, max_documents: int, timeout: float):
        self.max_requests = max_requests
        self.max_documents = max_documents
        self.longest_wait = LONGEST_WAIT * timeout
        self.requests = 0
        self.documents = 0
        self.stopping = False

    @contextmanager
    def admit_request(self, expected_seconds: float) -> Iterator[None]:
        """expected_seconds: until its turn. Raises RequestError with 503 or 429."""
        if self.stopping:
            raise RequestError(503, "the server is stopping; ask another one", retry_after=1)
        self.check_wait(expected_seconds)
        if self.requests >= self.max_requests:
            raise self._full(expected_seconds)
        self.requests += 1
        try:
            yield
        finally:
            self.requests -= 1

    @contextmanager
    def admit_documents(self, count: int) -> Iterator[None]:
        """Raises RequestError with 429."""
        if self.documents + count > self.max_documents:
            raise self._full(0)
        self.documents += count
        try:
            yield
        finally:
            self.documents -= count

    def check_wait(self, seconds: float) -> None:
        """Raises RequestError with 429 for a wait that would end close to the time-out."""
        if seconds > self.longest_wait:
            raise self._full(seconds)

    def _full(self, wait: float) -> RequestError:
        seconds = min(max(math.ceil(wait), 1), LONGEST_RETRY)
        inside = f"{self.requests} requests with {self.documents} documents are inside"
        return RequestError(429, f"the queue is full ({inside}); try again after {seconds} s", retry_after=seconds)


# ---- metrics --------------------------------------------------------------------------------------------


class ServerMetrics:
    """The series of one server, for Prometheus, in a separate registry. model: "reranker", "embedder" or
    "index_embedder"; its items are pairs or texts.

    Where several workers serve, the values of each stand in files (`shared_metrics`), and every worker shows the sums.
    An unknown path is counted as `other`: else a client could make any number of series.
    """

    def __init__(self):
        self.registry = CollectorRegistry()
        common = {"namespace": "rag_retrieval", "registry": self.registry}
        of_model = {"labelnames": ("model",), **common}
        gauge = {"multiprocess_mode": "livesum"}
        self.requests = Counter("requests", "Requests by path and status.", ("path", "status"), **common)
        self.request_seconds = Histogram(
            "request_seconds", "From a request's first byte to its answer.", ("path",), buckets=SECONDS, **common
        )
        self.items = Counter("items", "Pairs or texts computed.", **of_model)
        self.tokens = Counter("tokens", "Tokens computed.", **of_model)
        self.truncated = Counter("truncated_texts", "Texts that were not read whole.", **of_model)
        self.batch_items = Histogram("batch_items", "Pairs or texts computed together.", buckets=ITEMS, **of_model)
        self.batch_seconds = Histogram("batch_seconds", "Time of one batch.", buckets=SECONDS, **of_model)
        self.inside = Gauge("requests_inside", "Requests that were taken and not answered.", **gauge, **common)
        self.queue_items = Gauge("queue_items", "Pairs or texts that wait for a batch.", **gauge, **of_model)

    def watch(self, requests_inside: Callable[[], int], batchers: Mapping[str, Batcher]) -> None:
        """Where the gauges are read from. batchers: by model."""
        self._requests_inside, self._batchers = requests_inside, batchers

    def refresh(self) -> None:
        """Set the gauges. Other workers show what was set last, so it is done ten times a second."""
        self.inside.set(self._requests_inside())
        for model, batcher in self._batchers.items():
            self.queue_items.labels(model).set(batcher.waiting_items())

    def text(self) -> bytes:
        self.refresh()
        registry = self.registry
        if METRICS_VARIABLE in os.environ:
            registry = CollectorRegistry()
            MultiProcessCollector(registry)
        return generate_latest(registry)

    def batch_counter(self, model: str) -> Callable[[int, int, float], None]:
        """What a Batcher calls after each batch."""

        def count(items: int, tokens: int, seconds: float) -> None:
            self.items.labels(model).inc(items)
            self.tokens.labels(model).inc(tokens)
            self.batch_items.labels(model).observe(items)
            self.batch_seconds.labels(model).observe(seconds)

        return count


@contextmanager
def shared_metrics() -> Iterator[None]:
    """Processes that are started in this block count into files of a folder that they share.

    The library decides by the variable when it is imported, so that a process has to be a new one.
    """
    with TemporaryDirectory(prefix="rag-retrieval-metrics-") as folder:
        before = os.environ.get(METRICS_VARIABLE)
        os.environ[METRICS_VARIABLE] = folder
        try:
            yield
        finally:
            del os.environ[METRICS_VARIABLE]
            if before is not None:
                os.environ[METRICS_VARIABLE] = before
