"""A service with an embedder for tests, and one request to it in this process."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager

import httpx
from serve_samples import BATCH_TOKENS, client_of

from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.serve.app import Service
from rag_retrieval.serve.batching import Batcher
from rag_retrieval.serve.config import ServeConfig
from rag_retrieval.serve.embedding import EMBEDDER, EmbedModel
from rag_retrieval.serve.endpoints import ServedModel
from rag_retrieval.serve.http import ServerMetrics
from rag_retrieval.serve.server import EMBEDDING_ENDPOINTS

MIXED = ["capital of France", "水在一百度时沸腾。", "🐼 eats 竹子 🎋", "", " ", "capital of France", "Paris " * 200]


@contextmanager
def running_embedder(
    embedder: Embedder, token: bytes | None = None, batch_tokens: int = BATCH_TOKENS, **options
) -> Iterator[Service]:
    """options: of ServeConfig; without a timeout among them none ends, however slow the machine."""
    options = {"timeout": 3600} | options
    config, metrics, model = ServeConfig(embedder="tiny", **options), ServerMetrics(), EmbedModel("tiny", embedder)
    with Batcher(model.compute, batch_tokens, metrics.batch_counter(EMBEDDER)) as batcher:
        endpoints = [kind(config, model, batcher, metrics) for kind in EMBEDDING_ENDPOINTS]
        service = Service(config, {EMBEDDER: ServedModel("tiny", batcher, model.info)}, endpoints, metrics, token)
        yield service
        service.close()


def ask(service: Service, path: str, method: str = "POST", **options) -> httpx.Response:
    async def one() -> httpx.Response:
        async with client_of(service) as client:
            return await client.request(method, path, **options)

    return asyncio.run(one())
