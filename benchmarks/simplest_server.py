"""sentence-transformers behind the simplest server that people write: one lock, one call of the model a request.

`serve.py --beside` starts it: `python benchmarks/simplest_server.py embedder|reranker DIR`. It answers as far as that
needs: `/v1/embeddings` as OpenAI does, `/rerank` as text-embeddings-inference does.
"""

import asyncio
import socket
import sys
import threading

import numpy as np
import uvicorn
from sentence_transformers import CrossEncoder, SentenceTransformer
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from torch.nn import Identity


def main() -> None:
    kind, folder = sys.argv[1:]
    lock = threading.Lock()
    if kind == "embedder":
        embedder = SentenceTransformer(folder, device="cpu")

        def compute(body: dict) -> dict:
            with lock:
                vectors = embedder.encode(body["input"], show_progress_bar=False)
            return {"data": [{"index": index, "embedding": row} for index, row in enumerate(vectors.tolist())]}

    else:
        reranker = CrossEncoder(folder, device="cpu", activation_fn=Identity())

        def compute(body: dict) -> list[dict]:
            with lock:
                scores = reranker.predict([(body["query"], text) for text in body["texts"]], show_progress_bar=False)
            return [{"index": int(at), "score": float(scores[at])} for at in np.argsort(-scores, kind="stable")]

    async def answer(request: Request) -> JSONResponse:
        return JSONResponse(await asyncio.to_thread(compute, await request.json()))

    path = "/v1/embeddings" if kind == "embedder" else "/rerank"
    with socket.create_server(("127.0.0.1", 0)) as opened:
        print(f"listening on http://127.0.0.1:{opened.getsockname()[1]}", file=sys.stderr, flush=True)
        app = Starlette(routes=[Route(path, answer, methods=["POST"])])
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[opened])


if __name__ == "__main__":
    main()
