"""`rag-retrieval serve --model DIR`: from options to a server that listens.

A wrong option, token or port is an error before the model is loaded, and the port listens after the model has scored
its first pairs: whoever reaches the server finds it ready.
"""

import logging
from ipaddress import ip_address
from pathlib import PurePath
from typing import TYPE_CHECKING

from rag_retrieval.core.command import report, run_command
from rag_retrieval.serve.serve_config import SERVE, TOKEN_VARIABLE, ServeConfig

if TYPE_CHECKING:
    import socket

    from rag_retrieval.infer.backend import Backend

USAGE = "usage: rag-retrieval serve --model DIR [--config FILE] [--KEY VALUE ...]"
SERVE_LIBRARIES = ("starlette", "uvicorn", "prometheus_client")
INSTALL = "; run: pip install -e '.[serve]'"

log = logging.getLogger(__name__)


def main(arguments: list[str]) -> int:
    """Returns the exit code: 0 stopped by SIGTERM or Ctrl-C; 2 for a mistake in options, token, port or model; 130 for
    Ctrl-C before it listened. With RAG_RETRIEVAL_TRACEBACK=1 in the environment, errors are raised instead."""
    return run_command(SERVE, USAGE, arguments, run)


def run(config: ServeConfig) -> int:
    try:
        serve(config)
    except KeyboardInterrupt:
        return report(InterruptedError("interrupted before the server listened"), 130, on_all_processes=False)
    except ImportError as error:
        ours = error.name in SERVE_LIBRARIES  # else of the model's backend, whose message says what to install
        return report(ImportError(f"{error}{INSTALL if ours else ''}"), 2, on_all_processes=False)
    except (ValueError, OSError) as error:
        return report(error, 2, on_all_processes=False)
    return 0


def serve(config: ServeConfig) -> None:
    from rag_retrieval.infer.reranker import Reranker
    from rag_retrieval.serve.http import read_token
    from rag_retrieval.serve.server import bound_socket

    token = read_token(config.token_file)
    opened = bound_socket(config.host, config.port)
    if token is None and not ip_address(opened.getsockname()[0]).is_loopback:
        log.warning("other machines see %s, and no token is asked for: set %s", config.host, TOKEN_VARIABLE)
    options = {"max_length": config.max_len, "precision": config.precision, "device": config.device}
    with opened, Reranker(config.model, **options) as reranker:
        serve_backend(config, reranker.backend, token, opened)


def serve_backend(config: ServeConfig, backend: "Backend", token: bytes | None, opened: "socket.socket") -> None:
    """Returns when a signal has stopped the server."""
    from rag_retrieval.serve.app import RerankService
    from rag_retrieval.serve.batching import Batcher
    from rag_retrieval.serve.http import ServerMetrics
    from rag_retrieval.serve.reranking import MOST_TOKENS, RerankModel, warm_up
    from rag_retrieval.serve.server import run_server

    model = RerankModel(config.name or PurePath(config.model).name, backend, config.long_document)
    metrics = ServerMetrics()
    with Batcher(model.score, MOST_TOKENS, metrics.count_batch) as batcher:
        warm_up(model, batcher, config.batch_tokens)
        log.info("%s is loaded; batches of %s tokens", model.name, f"{batcher.batch_tokens:,}")
        service = RerankService(config, model, batcher, metrics, token)
        run_server(service.app, service.admission, opened, config.timeout)
        service.close()
