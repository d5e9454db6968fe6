"""The web application: routes, and the steps of a request.

authorization -> admission -> body -> fields -> tokens, in pieces -> scores -> answer

Parsing and tokenizing run in a few threads, scoring in the batcher's. A request that ends early (its time is over, its
client has gone) is cancelled: what of it waits is never computed.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import rag_retrieval
from rag_retrieval.serve.batching import Batcher
from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.http import (
    CLIENT_GONE,
    Admission,
    RequestError,
    ServerMetrics,
    error_response,
    is_authorized,
    read_body,
    read_to_the_end,
    while_connected,
)
from rag_retrieval.serve.reranking import PIECE_CHARACTERS, EncodedTask, RerankModel
from rag_retrieval.serve.schemas import RerankTask, document_answer, limited_request, parse_request, text_answer

RERANK_PATHS = ("/rerank", "/v1/rerank", "/v2/rerank")
OTHER_PATHS = ("/health", "/info", "/metrics")
THREADS = 2  # for bodies and tokens; tokenizers use all cores by themselves

Handler = Callable[[Request], Awaitable[Response]]

log = logging.getLogger(__name__)


class PieceThreads:
    """Threads for the work of many requests, cut into pieces. A request hands in one piece after another, so requests
    take turns. left: by request, the characters of all its pieces that are not done."""

    def __init__(self, threads: int):
        self.threads = threads
        self.left: dict[str, int] = {}
        self._seconds_per_character = 0.0
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="serve-pieces")

    async def run(self, characters: int, work: Callable[..., Any], *arguments: Any) -> Any:
        def timed() -> tuple[Any, float]:
            started = time.perf_counter()
            return work(*arguments), time.perf_counter() - started

        result, seconds = await asyncio.get_running_loop().run_in_executor(self._pool, timed)
        if characters:
            self._seconds_per_character += 0.1 * (seconds / characters - self._seconds_per_character)
        return result

    def expected_seconds(self) -> float:
        """How long a new request waits for its first turn."""
        characters = sum(min(left, PIECE_CHARACTERS) for left in self.left.values())
        return characters * self._seconds_per_character / self.threads

    def close(self) -> None:
        self._pool.shutdown(cancel_futures=True)


class RerankService:
    """A model behind HTTP. app: the ASGI application. admission: what is inside, and whether the server stops.

    token: what requests must bring, None for nothing. The caller closes the batcher.
    """

    def __init__(
        self, config: ServeConfig, model: RerankModel, batcher: Batcher, metrics: ServerMetrics, token: bytes | None
    ):
        self.config = config
        self.model = model
        self.batcher = batcher
        self.metrics = metrics
        self.token = token
        self.pieces = PieceThreads(THREADS)
        self.request_schema = limited_request(config.max_documents)
        self.admission = Admission(
            config.queue_requests,
            config.queue_pairs,
            config.timeout,
            lambda: batcher.expected_seconds() + self.pieces.expected_seconds(),
        )
        metrics.watch(lambda: self.admission.requests, batcher.waiting_items)
        routes = [Route(path, self._answering(path, self.rerank), methods=["POST"]) for path in RERANK_PATHS]
        for path, handler in zip(OTHER_PATHS, (self.health, self.info, self.show_metrics), strict=True):
            routes.append(Route(path, self._answering(path, handler)))
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: self._no_such_route})
        self.app.router.redirect_slashes = False  # it would redirect to whatever Host says

    async def health(self, request: Request) -> Response:
        """200 while requests are taken. The model was warmed up before the server listened."""
        if self.admission.stopping or not self.batcher.is_alive:
            raise RequestError(503, "the server is stopping" if self.admission.stopping else "the scoring thread ended")
        return JSONResponse({"status": "ok", "model": self.model.name})

    async def info(self, request: Request) -> Response:
        """With the keys of text-embeddings-inference where there are such."""
        self._authorize(request)
        return JSONResponse(
            {
                "model_id": self.model.name,
                "model_type": {"reranker": {}},
                "max_input_length": self.model.backend.pair_encoder.max_length,
                "max_client_batch_size": self.config.max_documents,
                "max_concurrent_requests": self.config.queue_requests,
                "max_batch_tokens": self.batcher.batch_tokens,
                "auto_truncate": True,
                "long_document": self.config.long_document,
                "score_type": self.model.score_type,
                "version": rag_retrieval.__version__,
            }
        )

    async def show_metrics(self, request: Request) -> Response:
        self._authorize(request)
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def rerank(self, request: Request) -> Response:
        self._authorize(request)
        deadline = asyncio.get_running_loop().time() + self.config.timeout
        with self.admission.admit_request():
            body = await read_body(request, self.config.max_body_bytes, deadline)
            request.state.body_was_read = True
            return await while_connected(request, self._answer(body, request.state.id), deadline)

    async def _answer(self, body: bytes, request_id: str) -> Response:
        task = await self.pieces.run(0, parse_request, body, self.request_schema, self.config.max_characters)
        with self.admission.admit_documents(len(task.documents)):
            encoded = await self._encode(task, request_id)
            pairs = encoded.pairs
            self.admission.check_wait(self.batcher.expected_seconds(sum(map(len, pairs))))
            scores = await asyncio.wrap_future(self.batcher.submit(pairs))
        logits = self.model.logits(task, encoded, scores)
        shown, score_type = self.model.shown(logits, task.raw_scores)
        truncated = [position for position, text in enumerate(task.documents) if text in encoded.truncated]
        self.metrics.truncated.inc(len(truncated))
        if task.as_texts:
            answer = text_answer(task, logits, shown)
        else:
            tokens = sum(map(len, pairs))
            answer = document_answer(task, logits, shown, score_type, tokens, truncated, self.model.name, request_id)
        return JSONResponse(answer, headers={"X-Score-Type": score_type})

    async def _encode(self, task: RerankTask, request_id: str) -> EncodedTask:
        encoded, left = EncodedTask(), self.pieces.left
        left[request_id] = sum(map(len, task.documents))
        try:
            for piece in self.model.pieces(task):
                characters = sum(map(len, piece))
                await self.pieces.run(characters, self.model.encode, task, piece, encoded)
                left[request_id] -= characters
        finally:
            del left[request_id]
        return encoded

    def _authorize(self, request: Request) -> None:
        if not is_authorized(request.headers.get("authorization"), self.token):
            raise RequestError(401, "expected the header Authorization: Bearer TOKEN with the token of this server")

    def _answering(self, path: str, handler: Handler) -> Handler:
        """The handler with an id for each request, errors as answers, and its time and status counted."""

        async def answer(request: Request) -> Response:
            started = time.perf_counter()
            response = await self._with_errors_as_answers(request, handler)
            self.metrics.requests.labels(path, response.status_code).inc()
            if path in RERANK_PATHS:
                self.metrics.request_seconds.observe(time.perf_counter() - started)
            return response

        return answer

    async def _with_errors_as_answers(self, request: Request, handler: Handler) -> Response:
        request.state.id, request.state.body_was_read = uuid.uuid4().hex, False
        try:
            response = await handler(request)
        except RequestError as error:
            response = error_response(error, request.state.id)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except Exception:
            log.exception("request %s failed", request.state.id)
            message = f"an error inside the server; its log has it under {request.state.id}"
            response = error_response(RequestError(500, message), request.state.id)
        response.headers["X-Request-Id"] = request.state.id
        if not request.state.body_was_read and not await read_to_the_end(request, 2 * self.config.max_body_bytes):
            response.headers["Connection"] = "close"
        return response

    async def _no_such_route(self, request: Request, error: Exception) -> Response:
        """404 and 405 in the same body as all errors."""
        assert isinstance(error, HTTPException)
        self.metrics.requests.labels("other", error.status_code).inc()
        paths = f"POST to {', '.join(RERANK_PATHS)}, GET {', '.join(OTHER_PATHS)}"

        async def refuse(request: Request) -> Response:
            raise RequestError(error.status_code, f"{error.detail}; {paths}")

        response = await self._with_errors_as_answers(request, refuse)
        response.headers.update(error.headers or {})
        return response

    def close(self) -> None:
        self.pieces.close()
