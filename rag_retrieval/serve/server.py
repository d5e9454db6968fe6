"""The command `serve`: from a configuration to a server that listens, its connections, and how it stops.

uvicorn itself bounds neither the number of connections nor the time that one may take to send a request, drops a
client that has closed its sending half, answers malformed HTTP in plain text, and at a signal closes its port at once
and ends by that signal. Here the port stays open while requests are inside, so that new ones get a 503 that says why,
and a load balancer sees /health turn.
"""

import asyncio
import json
import logging
import math
import os
import resource
import socket
import uuid
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from ipaddress import ip_address
from multiprocessing.connection import Connection
from types import FrameType
from typing import ClassVar

import h11
import uvicorn
from prometheus_client.multiprocess import mark_process_dead
from uvicorn.protocols.http.h11_impl import H11Protocol

from rag_retrieval.core.command import describe_error, with_extra
from rag_retrieval.core.log import set_up_logging
from rag_retrieval.serve.app import Service
from rag_retrieval.serve.config import TOKEN_VARIABLE, ServeConfig
from rag_retrieval.serve.embedding import EMBEDDER, opened_embedder
from rag_retrieval.serve.embedding_cohere import CohereEmbed, CohereEmbedV1
from rag_retrieval.serve.embedding_openai import OpenAIEmbeddings
from rag_retrieval.serve.embedding_tei import Embed, EmbedAll, EmbedSparse, Similarity, Tokenize
from rag_retrieval.serve.endpoints import Endpoint, ServedModel
from rag_retrieval.serve.http import RequestError, ServerMetrics, error_body, read_token, shared_metrics
from rag_retrieval.serve.page import PageEndpoint
from rag_retrieval.serve.predicting import PredictEndpoint
from rag_retrieval.serve.reranking import RERANKER, RerankEndpoint, opened_reranker
from rag_retrieval.serve.searching import INDEX, INDEX_EMBEDDER, DocumentEndpoint, opened_search
from rag_retrieval.serve.workers import READY, Workers, ignore_signals

KEEP_ALIVE = 30  # seconds that an idle connection stays open: longer than those of clients' pools, which are 5 to 15
HEADER_SECONDS = 10  # from a connection's or a request's first byte to the end of its headers
GRACE = 5  # seconds beyond the time-out of requests in which their answers are sent
MOST_CONNECTIONS = 4096
OTHER_FILES = 256  # descriptors that are left for everything but connections
BACKLOG = 64  # connections that wait to be accepted; asyncio accepts so many before it looks at one of them
WORKER_ACCEPTS = 8  # of a worker, which leaves others to the others
PROBE_SECONDS = 0.2
THREAD_VARIABLES = ("OMP_NUM_THREADS", "RAYON_NUM_THREADS")  # of torch, ONNX Runtime and OpenVINO; of tokenizers
LOG_SECONDS = 10  # at most one line about connections in so many

RERANKING_ENDPOINTS = (RerankEndpoint, PredictEndpoint)
EMBEDDING_ENDPOINTS = (
    OpenAIEmbeddings, Embed, EmbedAll, EmbedSparse, Similarity, Tokenize, CohereEmbed, CohereEmbedV1,
)  # fmt: skip

log = logging.getLogger(__name__)


def serve(config: ServeConfig) -> int:
    """The exit code: 0 when a signal has stopped the server. Raises ValueError and OSError for a wrong token, port or
    model.

    A wrong token or port is an error before a model is loaded, and the port listens after the models have computed
    their first batches: a server that can be reached is ready.
    """
    token = read_token(config.token_file)
    with bound_socket(config.host, config.port) as opened:
        if token is None and not ip_address(opened.getsockname()[0]).is_loopback:
            log.warning("other machines see %s, and no token is asked for: set %s", config.host, TOKEN_VARIABLE)
        if config.workers > 1:
            run_workers(config, token, opened)
        else:
            with opened_service(config, token) as service:
                run_server(service, opened)
        log.info("stopped")
    return 0


@contextmanager
def opened_service(config: ServeConfig, token: bytes | None) -> Iterator[Service]:
    """With the models that the configuration names, warmed up."""
    metrics = ServerMetrics()
    models: dict[str, ServedModel] = {}
    endpoints: list[Endpoint] = []
    with ExitStack() as stack:
        reranking = embedding = None
        if config.model is not None:
            reranking = model, batcher = stack.enter_context(opened_reranker(config, metrics))
            models[RERANKER] = ServedModel(model.name, batcher, model.info)
            endpoints += [kind(config, model, batcher, metrics) for kind in RERANKING_ENDPOINTS]
        if config.embedder is not None:
            embedding = stack.enter_context(opened_embedder(config, metrics))
        if config.index is not None:
            search = stack.enter_context(opened_search(config, metrics, embedding, reranking))
            models[INDEX] = ServedModel(search.name, None, search.info)
            endpoints += [search, DocumentEndpoint(search.retriever.index), PageEndpoint()]
            if embedding is None:
                embedding = search.embedding
            elif search.embedding not in (None, embedding):
                model, batcher = search.embedding
                models[INDEX_EMBEDDER] = ServedModel(model.name, batcher, model.info)
        if embedding is not None:
            model, batcher = embedding
            models[EMBEDDER] = ServedModel(model.name, batcher, model.info)
            endpoints += [kind(config, model, batcher, metrics) for kind in EMBEDDING_ENDPOINTS]
        for role, served in models.items():
            tokens = f"; batches of {served.batcher.batch_tokens:,} tokens" if served.batcher is not None else ""
            log.info("%s %s is loaded%s", role, served.name, tokens)
        service = Service(config, models, endpoints, metrics, token)
        stack.callback(service.close)
        yield service


# ---- connections ----------------------------------------------------------------------------------------


class ClientConnection(H11Protocol):
    """One connection. most: how many there may be; beyond it, the one is closed whose client has sent no request for
    the longest time. waiting: those between requests, in this order."""

    most: ClassVar[int] = MOST_CONNECTIONS
    waiting: ClassVar[dict["ClientConnection", None]] = {}
    dropped: ClassVar[int] = 0  # since the last line in the log
    last_logged: ClassVar[float] = -math.inf

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self.half_closed = False
        self.waiting[self] = None
        self.header_timer: asyncio.TimerHandle | None = self.loop.call_later(HEADER_SECONDS, self.drop)
        if len(self.connections) > self.most:
            next(iter(self.waiting)).drop()

    def data_received(self, data: bytes) -> None:
        if self in self.waiting and self.header_timer is None:
            self.header_timer = self.loop.call_later(HEADER_SECONDS, self.drop)
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.half_closed:
            self.transport.close()
        elif self.conn.their_state is h11.IDLE and not self.transport.is_closing():
            self.waiting[self] = None

    def connection_lost(self, exc: Exception | None) -> None:
        self._stop_waiting()
        super().connection_lost(exc)

    def _stop_waiting(self) -> None:
        self.waiting.pop(self, None)
        if self.header_timer is not None:
            self.header_timer.cancel()
            self.header_timer = None

    def drop(self) -> None:
        """Close without an answer: nothing was asked in time, or the room is needed."""
        self._stop_waiting()
        self.connections.discard(self)
        self.transport.abort()
        kind = type(self)
        kind.dropped += 1
        if self.loop.time() - kind.last_logged > LOG_SECONDS:
            log.warning("%d connections without a request closed, %d are open", kind.dropped, len(self.connections))
            kind.last_logged, kind.dropped = self.loop.time(), 0

    def eof_received(self) -> bool:
        """The client will send no more. Whether it still reads shows when something is written to it: the system of
        one that has gone refuses that, and the next write fails."""
        if self.cycle is None or self.cycle.response_complete:
            return False
        self.half_closed = True
        for seconds in (0, PROBE_SECONDS):
            self.loop.call_later(seconds, self._probe)
        return True

    def _probe(self) -> None:
        if not self.cycle.response_started and self.scope["http_version"] == "1.1":
            self.transport.write(b"HTTP/1.1 102 Processing\r\n\r\n")

    def send_400_response(self, msg: str) -> None:
        body = json.dumps(error_body(RequestError(400, f"no HTTP/1.1 request: {msg}"), uuid.uuid4().hex)).encode()
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event))
        self.transport.close()


# ---- start and stop -------------------------------------------------------------------------------------


class Server(uvicorn.Server):
    """Logs where it listens once it does. Stops at SIGTERM or SIGINT once nothing is inside, at a second one now.

    parent: of a worker; this process says there that it is ready, and is stopped from there in place of signals."""

    def __init__(self, config: uvicorn.Config, service: Service, parent: Connection | None):
        super().__init__(config)
        self.service = service
        self.parent = parent

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        sockets[0].listen(BACKLOG)
        if self.parent is None:
            log.info("listening on %s", address_of(sockets[0]))
            return
        asyncio.get_running_loop().add_reader(self.parent.fileno(), self.stop_by_parent)
        with suppress(OSError):  # the parent has died; then its pipe can be read
            self.parent.send(READY)

    def stop_by_parent(self) -> None:
        asyncio.get_running_loop().remove_reader(self.parent.fileno())
        self.service.admission.stopping = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        # not uvicorn's own: it would raise the signal again at the end, and the exit code would not be 0
        if self.parent is not None:
            return
        if self.service.admission.stopping:
            self.should_exit = self.force_exit = True
        self.service.admission.stopping = True

    async def on_tick(self, counter: int) -> bool:
        self.service.metrics.refresh()
        done = self.service.admission.stopping and self.service.admission.requests == 0
        return await super().on_tick(counter) or done


def bound_socket(host: str, port: int) -> socket.socket:
    """Bound and not listening, so that clients are refused until the model is there. Raises OSError."""
    try:
        addresses = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)
        family, kind, protocol, _, address = addresses[0]
        opened = socket.socket(family, kind, protocol)
        opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        opened.bind(address)
    except OSError as error:
        raise OSError(
            f"cannot listen on {host} port {port}: {error.strerror}; choose another --host or --port"
        ) from error
    return opened


def address_of(opened: socket.socket) -> str:
    """`http://127.0.0.1:8080`."""
    host, port = opened.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def most_connections() -> int:
    """As many as the process may open files, less those that it needs itself."""
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if limit == resource.RLIM_INFINITY:
        return MOST_CONNECTIONS
    return min(MOST_CONNECTIONS, max(limit - OTHER_FILES, limit // 2))


def run_server(service: Service, opened: socket.socket, parent: Connection | None = None) -> None:
    """Serve until a signal, or until `parent` says so."""
    ClientConnection.most = most_connections()
    config = uvicorn.Config(
        service.app,
        loop="asyncio",
        http=ClientConnection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        backlog=BACKLOG if parent is None else WORKER_ACCEPTS,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(service.config.timeout) + GRACE,
    )
    Server(config, service, parent).run(sockets=[opened])


# ---- workers --------------------------------------------------------------------------------------------


def run_workers(config: ServeConfig, token: bytes | None, opened: socket.socket) -> None:
    """Serve with `config.workers` processes until a signal.

    All accept from the one socket of this process. With a socket of each on the same port (SO_REUSEPORT), what waits
    at a worker that dies would be lost, and a second server could take the port unnoticed.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if config.workers > cores:
        log.warning("%d workers share %d cores; with fewer, each batch is computed faster", config.workers, cores)
    for variable in THREAD_VARIABLES:
        os.environ.setdefault(variable, str(max(1, cores // config.workers)))

    def on_ready() -> None:
        log.info("listening on %s with %d workers", address_of(opened), config.workers)

    stop_seconds = math.ceil(config.timeout) + 2 * GRACE
    with shared_metrics():
        arguments = (config, token, opened)
        Workers(config.workers, serve_in_worker, arguments, stop_seconds, on_ready, on_end=mark_process_dead).run()


def serve_in_worker(config: ServeConfig, token: bytes | None, opened: socket.socket, parent: Connection) -> None:
    ignore_signals()
    set_up_logging()
    try:
        with opened_service(config, token) as service:
            run_server(service, opened, parent)
    except (ValueError, OSError, ImportError) as error:
        parent.send(describe_error(with_extra(error) if isinstance(error, ImportError) else error))
