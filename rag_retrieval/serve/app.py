"""The web application: routes, and the way of a request through them.

authorization -> admission -> body -> fields -> tokens (in a thread) -> scores (in the batcher's thread) -> answer

What a reader would get wrong: a request that ends early (its time is over, its client has gone) is cancelled where it
stands, and what of it waits in the batcher is dropped before it is computed.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from rag_retrieval.serve.admission import Admission
from rag_retrieval.serve.batching import Batcher
from rag_retrieval.serve.bearer_token import is_authorized
from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.refusal import CLIENT_GONE, Refusal, error_response
from rag_retrieval.serve.request_body import read_body, unless_gone
from rag_retrieval.serve.rerank_answer import document_answer, text_answer
from rag_retrieval.serve.rerank_request import RerankRequest, TextLimits, parse_request
from rag_retrieval.serve.served_model import EncodedRequest, ServedModel
from rag_retrieval.serve.server_metrics import ServerMetrics

RERANK_PATHS = ("/rerank", "/v1/rerank", "/v2/rerank")
ENCODING_THREADS = 4

Handler = Callable[[Request], Awaitable[Response]]

log = logging.getLogger(__name__)


class RerankService:
    """A model behind HTTP. app: the ASGI application. admission: what is inside, and whether the server stops.

    token: what requests must bring, None for nothing. The batcher is closed by whoever made it.
    """

    def __init__(
        self, config: ServeConfig, model: ServedModel, batcher: Batcher, metrics: ServerMetrics, token: bytes | None
    ):
        self.config = config
        self.model = model
        self.batcher = batcher
        self.metrics = metrics
        self.token = token
        self.limits = TextLimits(config.max_documents, config.max_characters)
        bounds = (config.queue_requests, config.queue_pairs, config.timeout)
        self.admission = Admission(*bounds, batcher.expected_seconds)
        metrics.watch(lambda: self.admission.requests, batcher.waiting_pairs)
        self._encoding = ThreadPoolExecutor(ENCODING_THREADS, thread_name_prefix="rerank-encoding")
        routes = [Route(path, self._answering(path, self.rerank), methods=["POST"]) for path in RERANK_PATHS]
        routes.append(Route("/health", self._answering("/health", self.health)))
        routes.append(Route("/metrics", self._answering("/metrics", self.show_metrics)))
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: self._no_such_route})

    async def health(self, request: Request) -> Response:
        """200 while requests are taken. The model was warmed up before the server listened."""
        if self.admission.stopping or not self.batcher.is_alive:
            raise Refusal(503, "the server is stopping" if self.admission.stopping else "the scoring thread has ended")
        return JSONResponse({"status": "ok", "model": self.model.name})

    async def show_metrics(self, request: Request) -> Response:
        self._authorize(request)
        return Response(generate_latest(self.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    async def rerank(self, request: Request) -> Response:
        self._authorize(request)
        deadline = asyncio.get_running_loop().time() + self.config.timeout
        with self.admission.request():
            body = await read_body(request, self.config.max_body_bytes, deadline)
            asked = parse_request(body, self.limits)
            with self.admission.documents(len(asked.documents)):
                encoded, pair_scores = await unless_gone(request, self._score(asked), deadline)
        return self._answer(request, asked, encoded, pair_scores)

    async def _score(self, asked: RerankRequest) -> tuple[EncodedRequest, np.ndarray]:
        loop = asyncio.get_running_loop()
        encoded = await loop.run_in_executor(self._encoding, self.model.encode, asked)
        pair_scores = await asyncio.wrap_future(self.batcher.submit(encoded.pairs))
        self.metrics.truncated.inc(len(encoded.truncated))
        return encoded, pair_scores

    def _answer(
        self, request: Request, asked: RerankRequest, encoded: EncodedRequest, pair_scores: np.ndarray
    ) -> Response:
        scores = self.model.document_scores(encoded, pair_scores)
        shown = self.model.shown(scores, asked.raw_scores)
        if asked.text_shape:
            return JSONResponse(text_answer(asked, scores, shown))
        return JSONResponse(document_answer(asked, scores, shown, encoded, self.model.name, request.state.id))

    def _authorize(self, request: Request) -> None:
        if not is_authorized(request.headers.get("authorization"), self.token):
            raise Refusal(401, "expected the header Authorization: Bearer TOKEN with the token of this server")

    def _answering(self, path: str, handler: Handler) -> Handler:
        """The handler with an id for each request, errors as answers, and its time and status counted."""

        async def answer(request: Request) -> Response:
            started = time.perf_counter()
            request.state.id = uuid.uuid4().hex
            response = await self._with_errors_as_answers(request, handler)
            response.headers["X-Request-Id"] = request.state.id
            self.metrics.requests.labels(path, response.status_code).inc()
            if path in RERANK_PATHS:
                self.metrics.request_seconds.observe(time.perf_counter() - started)
            return response

        return answer

    async def _with_errors_as_answers(self, request: Request, handler: Handler) -> Response:
        try:
            return await handler(request)
        except Refusal as refusal:
            return error_response(refusal, request.state.id)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except Exception:
            log.exception("request %s failed", request.state.id)
            message = f"an error inside the server; its log tells more under {request.state.id}"
            return error_response(Refusal(500, message), request.state.id)

    async def _no_such_route(self, request: Request, error: Exception) -> Response:
        """404 and 405 in the same body as all errors."""
        assert isinstance(error, HTTPException)
        self.metrics.requests.labels("other", error.status_code).inc()
        message = f"{error.detail}; POST to {', '.join(RERANK_PATHS)}, GET /health or /metrics"
        response = error_response(Refusal(error.status_code, message), uuid.uuid4().hex)
        response.headers.update(error.headers or {})
        return response

    def close(self) -> None:
        self._encoding.shutdown(cancel_futures=True)
