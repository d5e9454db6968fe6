"""A service with one model for tests: in this process over ASGI, on a free loopback port in a thread, or as the command
in a process of its own."""

import asyncio
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import httpx
import numpy as np

from rag_retrieval.infer.backend import Backend
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.serve.app import Service
from rag_retrieval.serve.batching import Batcher, Compute
from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.embedding import EmbedModel
from rag_retrieval.serve.endpoints import Endpoint, ServedModel
from rag_retrieval.serve.http import ServerMetrics
from rag_retrieval.serve.reranking import RERANKER, RerankModel
from rag_retrieval.serve.server import RERANKING_ENDPOINTS, address_of, bound_socket, run_server

ROOT = Path(__file__).resolve().parents[1]
START = 600  # seconds
BATCH_TOKENS = 256
TEXT = "capital France Paris river Seine file Python line water light sugar oxygen fever cough train station"
WORDS = TEXT.split()


class GatedBackend:
    """A backend whose scoring waits for a gate; calls: the number of pairs of each finished one."""

    def __init__(self, backend: Backend):
        self.backend = backend
        self.model_type = backend.model_type
        self.pair_encoder = backend.pair_encoder
        self.calibration = backend.calibration
        self.gate = threading.Event()
        self.entered = threading.Event()
        self.calls: list[int] = []

    def score(self, pairs, batch_size: int) -> np.ndarray:
        self.entered.set()
        assert self.gate.wait(60)
        self.calls.append(len(pairs))
        return self.backend.score(pairs, batch_size)


@contextmanager
def service_of(
    role: str,
    served: RerankModel | EmbedModel,
    compute: Compute,
    kinds: Sequence[type[Endpoint]],
    token: bytes | None = None,
    batch_tokens: int = BATCH_TOKENS,
    **options,
) -> Iterator[Service]:
    """compute: of the Batcher. options: of ServeConfig; without a timeout among them none ends, however slow the
    machine."""
    config, metrics = ServeConfig(**{"timeout": 3600} | options), ServerMetrics()
    with Batcher(compute, batch_tokens, metrics.batch_counter(role)) as batcher:
        models = {role: ServedModel(served.name, batcher, served.info)}
        endpoints = [kind(config, served, batcher, metrics) for kind in kinds]
        service = Service(config, models, endpoints, metrics, token)
        yield service
        service.close()


def running_service(
    backend, token: bytes | None = None, long_document: str = "truncate", **options
) -> AbstractContextManager[Service]:
    """With a reranker. options: of `service_of`."""
    model = RerankModel("tiny", backend, long_document)
    return service_of(RERANKER, model, model.score, RERANKING_ENDPOINTS, token, model="tiny", **options)


def client_of(service: Service, **options) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(service.app), base_url="http://test", **options)


@contextmanager
def listening(service: Service) -> Iterator[str]:
    """The address of a real server in a thread."""
    with bound_socket("127.0.0.1", 0) as opened:
        address = address_of(opened)
        thread = threading.Thread(target=run_server, args=(service, opened))
        thread.start()
        wait_until(lambda: answers(address))
        yield address
        service.admission.stopping = True
        thread.join(60)
        assert not thread.is_alive()


class ServerProcess:
    """A running command. address: None until it listens. log: what it printed so far."""

    def __init__(self, process: subprocess.Popen):
        self.process = process
        self.lines: list[str] = []
        threading.Thread(target=lambda: self.lines.extend(iter(process.stdout.readline, "")), daemon=True).start()

    @property
    def log(self) -> str:
        return "".join(self.lines)

    @property
    def address(self) -> str | None:
        found = re.search(r"listening on (http://\S+)", self.log)
        return found[1] if found else None


@contextmanager
def started(
    *options: str, program: tuple[str, ...] = ("-m", "rag_retrieval.cli"), **environment: str
) -> Iterator[ServerProcess]:
    command = [sys.executable, *program, "serve", "--port", "0", *options]
    settings = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"} | environment
    process = subprocess.Popen(command, env=settings, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    try:
        server = ServerProcess(process)
        wait_until(lambda: server.address or process.poll() is not None, START)
        assert server.address, server.log
        yield server
    finally:
        process.kill()
        process.wait()


def answers(address: str) -> bool:
    try:
        return httpx.get(f"{address}/health", timeout=60).status_code == 200
    except httpx.TransportError:
        return False


def wait_until(condition, seconds: float = 60) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.01)


def skip_time(seconds: float) -> None:
    """The clock of the running event loop jumps ahead: what was due within so many seconds is due now."""
    loop = asyncio.get_running_loop()
    before = loop.time
    loop.time = lambda: before() + seconds


async def call_asgi(app, body: dict, gone) -> list[dict]:
    """What the application sends to a POST /rerank whose client leaves when the asyncio event `gone` is set."""
    sent, first = [], True

    async def receive():
        nonlocal first
        if first:
            first = False
            return {"type": "http.request", "body": json.dumps(body).encode(), "more_body": False}
        await gone.wait()
        return {"type": "http.disconnect"}

    async def send(message):
        sent.append(message)

    scope = {"type": "http", "method": "POST", "path": "/rerank", "raw_path": b"/rerank", "headers": [],
             "query_string": b"", "http_version": "1.1", "scheme": "http", "asgi": {"version": "3.0"}}  # fmt: skip
    await app(scope, receive, send)
    return sent


def random_documents(generator: np.random.Generator, count: int, longest: int = 30) -> list[str]:
    return [" ".join(generator.choice(WORDS, generator.integers(1, longest))) for _ in range(count)]


def numbered_pairs(first: int, count: int, tokens: int = 10) -> list[EncodedPair]:
    """Pairs of `tokens` tokens; the first id of pair k is `first + k`."""
    ids = [np.array([first + place] + [0] * (tokens - 1), np.int32) for place in range(count)]
    return [EncodedPair(own, None, False, 0) for own in ids]
