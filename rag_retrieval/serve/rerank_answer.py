"""From scores to the JSON that the client waits for, in the shape that it asked in.

Best first; equal scores keep the order of the request. What a reader would get wrong: the order is that of the scores,
not of the probabilities, which are equal where two high scores saturate.
"""

from typing import Any

import numpy as np

from rag_retrieval.serve.rerank_request import RerankRequest
from rag_retrieval.serve.served_model import EncodedRequest


def best_first(scores: np.ndarray, top_n: int | None) -> list[int]:
    """Positions of the `top_n` highest of scores: [documents]; of all for None."""
    return np.argsort(-scores, kind="stable")[:top_n].tolist()


def text_answer(request: RerankRequest, scores: np.ndarray, shown: np.ndarray) -> list[dict[str, Any]]:
    """text-embeddings-inference: `[{"index", "score", "text"}]`. shown: what is told as score, [documents]."""
    return [
        {"index": position, "score": float(shown[position])}
        | ({"text": request.documents[position]} if request.return_documents else {})
        for position in best_first(scores, request.top_n)
    ]


def document_answer(
    request: RerankRequest, scores: np.ndarray, shown: np.ndarray, encoded: EncodedRequest, model: str, request_id: str
) -> dict[str, Any]:
    """Cohere and Jina: `{"id", "model", "results", "usage", "meta"}`, where usage is Jina's and meta is Cohere's."""
    results = [
        {"index": position, "relevance_score": float(shown[position])}
        | ({"document": {"text": request.documents[position]}} if request.return_documents else {})
        for position in best_first(scores, request.top_n)
    ]
    tokens = sum(map(len, encoded.pairs))
    usage = {"total_tokens": tokens, "prompt_tokens": tokens}
    meta: dict[str, Any] = {"tokens": {"input_tokens": tokens}}
    if encoded.truncated:
        found = f"{len(encoded.truncated)} of {len(request.documents)} documents were too long and were cut"
        meta["warnings"] = [f"{found}, the first of them documents[{encoded.truncated[0]}]"]
    return {"id": request_id, "model": model, "results": results, "usage": usage, "meta": meta}
