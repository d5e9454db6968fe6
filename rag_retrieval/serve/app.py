"""The web application: routes, and the steps of a request.

authorization -> admission -> body -> task -> the endpoint's work -> answer

A request that ends early (its time is over, its client has gone) is cancelled: what of it waits is never computed.
"""

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable, Mapping, Sequence
from typing import Any

from prometheus_client import CONTENT_TYPE_LATEST
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

import rag_retrieval
from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.endpoints import Endpoint, PieceThreads, ServedModel, Work
from rag_retrieval.serve.http import (
    CLIENT_GONE,
    Admission,
    RequestError,
    ServerMetrics,
    check_content,
    error_body,
    error_response,
    is_authorized,
    read_body,
    read_to_the_end,
    while_connected,
)

OTHER_PATHS = ("/health", "/info", "/metrics")
TEXT_THREADS = 2  # for bodies and tokens; tokenizers use all cores by themselves
WORK_THREADS = 4  # for other work that blocks

Handler = Callable[[Request], Awaitable[Response]]
ErrorBody = Callable[[RequestError, str], dict[str, Any]]

log = logging.getLogger(__name__)


class Service:
    """Models behind HTTP. app: the ASGI application. admission: what is inside, and whether the server stops.

    models: by what they are, such as "reranker". token: what requests must bring, None for nothing. The caller closes
    the batchers.
    """

    def __init__(
        self,
        config: ServeConfig,
        models: Mapping[str, ServedModel],
        endpoints: Sequence[Endpoint],
        metrics: ServerMetrics,
        token: bytes | None,
    ):
        self.config = config
        self.models = models
        self.endpoints = endpoints
        self.metrics = metrics
        self.token = token
        self.batchers = {role: model.batcher for role, model in models.items() if model.batcher is not None}
        self.texts, self.work = PieceThreads(TEXT_THREADS, "serve-texts"), PieceThreads(WORK_THREADS, "serve-work")
        self.admission = Admission(config.queue_requests, config.queue_pairs, config.timeout)
        metrics.watch(lambda: self.admission.requests, self.batchers)
        routes = []
        for endpoint in endpoints:
            for path in endpoint.paths:
                handler = self._answering(path, self._handler_of(endpoint), endpoint.error_body)
                routes.append(Route(path, handler, methods=[endpoint.method]))
        for path, handler in zip(OTHER_PATHS, (self.health, self.info, self.show_metrics), strict=True):
            routes.append(Route(path, self._answering(path, handler, error_body)))
        self.app = Starlette(routes=routes, exception_handlers={HTTPException: self._no_such_route})
        self.app.router.redirect_slashes = False  # it would redirect to whatever Host says

    async def health(self, request: Request) -> Response:
        """200 while requests are taken. The models were warmed up before the server listened."""
        if self.admission.stopping:
            raise RequestError(503, "the server is stopping")
        for role, batcher in self.batchers.items():
            if not batcher.is_alive:
                raise RequestError(503, f"the thread of the {role} ended")
        return JSONResponse({"status": "ok", "models": {role: model.name for role, model in self.models.items()}})

    async def info(self, request: Request) -> Response:
        """With the keys of text-embeddings-inference where there are such: of the embedder, else of the first model;
        `models` has those of each."""
        self._authorize(request)
        of_models = {
            role: {"model_id": model.name, **model.info}
            | ({"max_batch_tokens": model.batcher.batch_tokens} if model.batcher is not None else {})
            for role, model in self.models.items()
        }
        main = of_models.get("embedder") or next(iter(of_models.values()))
        limits = {
            "max_client_batch_size": self.config.max_documents,
            "max_concurrent_requests": self.config.queue_requests,
            "tokenization_workers": TEXT_THREADS,
            "auto_truncate": True,
            "version": rag_retrieval.__version__,
        }
        return JSONResponse({**main, **limits, "models": of_models})

    async def show_metrics(self, request: Request) -> Response:
        self._authorize(request)
        return Response(self.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    def _handler_of(self, endpoint: Endpoint) -> Handler:
        async def handle(request: Request) -> Response:
            if not endpoint.public:
                self._authorize(request)
            deadline = asyncio.get_running_loop().time() + self.config.timeout
            with self.admission.admit_request(self._expected_seconds(endpoint)):
                if endpoint.method == "POST":
                    check_content(request)
                # a GET's too: what is awaited of its client from then on is that it leaves
                body = await read_body(request, self.config.max_body_bytes, deadline)
                request.state.body_was_read = True
                return await while_connected(request, self._answer(endpoint, body, request), deadline)

        return handle

    async def _answer(self, endpoint: Endpoint, body: bytes, request: Request) -> Response:
        # bodies are parsed before texts are tokenized: not before that is known who goes first
        task = await self.texts.run(endpoint.parse, body, request.scope["path"], first=True)
        with self.admission.admit_documents(endpoint.size(task)):
            return await endpoint.answer(task, Work(request.state.id, self.texts, self.work, self.admission))

    def _expected_seconds(self, endpoint: Endpoint) -> float:
        """How long a request waits for its turns with its texts and with the models."""
        models = (batcher.expected_seconds(first=endpoint.first) for batcher in endpoint.batchers)
        return self.texts.expected_seconds(endpoint.first) + sum(models)

    def _authorize(self, request: Request) -> None:
        if not is_authorized(request.headers.get("authorization"), self.token):
            raise RequestError(401, "expected the header Authorization: Bearer TOKEN with the token of this server")

    def _answering(self, path: str, handler: Handler, body_of: ErrorBody) -> Handler:
        """The handler with an id for each request, errors as answers, and its time and status counted."""

        async def answer(request: Request) -> Response:
            started = time.perf_counter()
            response = await self._with_errors_as_answers(request, handler, body_of)
            self.metrics.requests.labels(path, response.status_code).inc()
            if path not in OTHER_PATHS:
                self.metrics.request_seconds.labels(path).observe(time.perf_counter() - started)
            return response

        return answer

    async def _with_errors_as_answers(self, request: Request, handler: Handler, body_of: ErrorBody) -> Response:
        request.state.id, request.state.body_was_read = uuid.uuid4().hex, False
        try:
            response = await handler(request)
        except RequestError as error:
            response = error_response(error, request.state.id, body_of)
        except ClientDisconnect:
            return Response(status_code=CLIENT_GONE)
        except Exception:
            log.exception("request %s failed", request.state.id)
            message = f"an error inside the server; its log has it under {request.state.id}"
            response = error_response(RequestError(500, message), request.state.id, body_of)
        response.headers["X-Request-Id"] = request.state.id
        if not request.state.body_was_read and not await read_to_the_end(request, 2 * self.config.max_body_bytes):
            response.headers["Connection"] = "close"
        return response

    async def _no_such_route(self, request: Request, error: Exception) -> Response:
        """404 and 405 in the same body as all errors."""
        assert isinstance(error, HTTPException)
        self.metrics.requests.labels("other", error.status_code).inc()
        posts, gets = (
            ", ".join(path for endpoint in self.endpoints if endpoint.method == method for path in endpoint.paths)
            for method in ("POST", "GET")
        )
        paths = f"POST to {posts}; GET {', '.join(filter(None, (gets, *OTHER_PATHS)))}"

        async def refuse(request: Request) -> Response:
            raise RequestError(error.status_code, f"{error.detail}; {paths}")

        response = await self._with_errors_as_answers(request, refuse, error_body)
        response.headers.update(error.headers or {})
        return response

    def close(self) -> None:
        self.texts.close()
        self.work.close()
