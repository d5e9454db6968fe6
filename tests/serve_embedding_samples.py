"""A service with an embedder for tests, and one request to it in this process."""

import asyncio
from contextlib import AbstractContextManager

import httpx
from serve_samples import client_of, service_of

from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.serve.app import Service
from rag_retrieval.serve.embedding import EMBEDDER, EmbedModel
from rag_retrieval.serve.server import EMBEDDING_ENDPOINTS

MIXED = ["capital of France", "水在一百度时沸腾。", "🐼 eats 竹子 🎋", "", " ", "capital of France", "Paris " * 200]


def running_embedder(embedder: Embedder, token: bytes | None = None, **options) -> AbstractContextManager[Service]:
    """options: of `service_of`."""
    model = EmbedModel("tiny", embedder)
    return service_of(EMBEDDER, model, model.compute, EMBEDDING_ENDPOINTS, token, embedder="tiny", **options)


def ask(service: Service, path: str, method: str = "POST", **options) -> httpx.Response:
    async def one() -> httpx.Response:
        async with client_of(service) as client:
            return await client.request(method, path, **options)

    return asyncio.run(one())
