"""From a configuration to a server that listens.

A wrong token or port is reported before the model is loaded, and the port is opened after the model has scored its
first pairs, so that whoever reaches the server finds it ready.
"""

import logging
from ipaddress import ip_address
from pathlib import PurePath
from typing import TYPE_CHECKING

from rag_retrieval.serve.config import TOKEN_VARIABLE, ServeConfig

if TYPE_CHECKING:
    import socket

    from rag_retrieval.infer.backend import Backend

log = logging.getLogger(__name__)


def serve(config: ServeConfig) -> int:
    """The exit code: 0 when a signal has stopped the server. Raises ValueError and OSError for a wrong token, port or
    model."""
    from rag_retrieval.infer.reranker import Reranker
    from rag_retrieval.serve.bearer_token import read_token
    from rag_retrieval.serve.http_server import bound_socket

    token = read_token(config.token_file)
    opened = bound_socket(config.host, config.port)
    if token is None and not ip_address(opened.getsockname()[0]).is_loopback:
        log.warning("other machines see %s, and no token is asked for: set %s", config.host, TOKEN_VARIABLE)
    options = {"max_length": config.max_len, "precision": config.precision, "device": config.device}
    with opened, Reranker(config.model, **options) as reranker:
        serve_backend(config, reranker.backend, token, opened)
    return 0


def serve_backend(config: ServeConfig, backend: "Backend", token: bytes | None, opened: "socket.socket") -> None:
    """Returns when a signal has stopped the server."""
    from rag_retrieval.serve.app import RerankService
    from rag_retrieval.serve.batching import Batcher
    from rag_retrieval.serve.http_server import run_server
    from rag_retrieval.serve.served_model import ServedModel
    from rag_retrieval.serve.server_metrics import ServerMetrics
    from rag_retrieval.serve.warm_up import MOST_TOKENS, warm_up

    model = ServedModel(config.name or PurePath(config.model).name, backend, config.long_document)
    metrics = ServerMetrics()
    with Batcher(model.score, MOST_TOKENS, metrics.count_batch) as batcher:
        warm_up(model, batcher, config.batch_tokens)
        log.info("%s is loaded; batches of %s tokens", model.name, f"{batcher.batch_tokens:,}")
        service = RerankService(config, model, batcher, metrics, token)
        run_server(service.app, service.admission, opened, config.timeout)
        service.close()
