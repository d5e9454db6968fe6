"""The rerank requests that clients send, and the answers that they wait for.

`documents` asks as clients of Cohere, Jina and vLLM do, `texts` as those of text-embeddings-inference; each gets the
answer of its kind. Every key is honoured in both or refused: ignoring one would silently change the
result. docs/serve.md has the table.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, create_model

from rag_retrieval.infer.results import ScoreType, best_first
from rag_retrieval.serve.endpoints import StrictRequest, check_characters, cut_warning, limited_list, parse_json
from rag_retrieval.serve.http import RequestError

TEXTS = 'a list of strings or of objects with "text"'
EXPECTED = {"query": 'a string or an object with "text"', "documents": TEXTS, "texts": TEXTS}


class TextObject(BaseModel):
    """Cohere and Jina take these in the place of strings; further keys are metadata."""

    model_config = ConfigDict(strict=True)
    text: str


Text = str | TextObject


class RerankRequest(StrictRequest):
    """A request to rerank, as it is sent. `limited_request` sets the greatest number of documents.

    Of keys with a Literal (or None alone) only that value is taken, at which they change nothing: they are known to
    other servers, and to ignore them would change the result. Any other key is refused.
    """

    query: Text
    documents: list[Text] | None = None
    texts: list[Text] | None = None
    top_n: int | None = Field(None, ge=0)
    return_documents: bool | None = None
    return_text: bool | None = None
    raw_scores: bool | None = None
    use_activation: bool | None = None
    truncate: bool | None = None
    truncation: bool | None = None
    max_tokens_per_doc: int | None = Field(None, ge=0)
    truncation_direction: Literal["right", "Right"] | None = None
    truncation_side: Literal["right"] | None = None
    truncate_prompt_tokens: Literal[-1] | None = None
    max_tokens_per_query: Literal[0] | None = None
    max_chunks_per_doc: None = None
    rank_fields: tuple[Literal["text"]] | None = None
    top_k: None = None
    # known, and without an influence on the result
    model: str | None = None
    user: str | None = None
    priority: int | None = None
    request_id: str | None = None


def limited_request(max_documents: int) -> type[RerankRequest]:
    texts = limited_list("texts", Text, max_documents)
    fields = {"documents": (texts | None, None), "texts": (texts | None, None)}
    return create_model("LimitedRequest", __base__=RerankRequest, **fields)


@dataclass(frozen=True)
class RerankTask:
    """What is to be computed. as_texts: the answer is that of text-embeddings-inference. raw_scores: logits are shown.
    truncate: False refuses a pair that is too long. top_n, max_document_tokens: at least 1; None for all."""

    query: str
    documents: list[str]
    as_texts: bool = False
    top_n: int | None = None
    return_documents: bool = False
    raw_scores: bool = False
    truncate: bool = True
    max_document_tokens: int | None = None

    def place(self, position: int) -> str:
        return f"{'texts' if self.as_texts else 'documents'}[{position}]"


def parse_request(body: bytes, schema: type[RerankRequest], max_characters: int) -> RerankTask:
    """schema: of `limited_request`. Raises RequestError as `parse_json`."""
    request = parse_json(body, schema, EXPECTED)
    given = [name for name in ("documents", "texts") if getattr(request, name) is not None]
    if len(given) != 1:
        raise RequestError(422, f"expected either documents or texts, found {'both' if given else 'neither'}")
    name = given[0]
    query, documents = text_of(request.query), [text_of(text) for text in getattr(request, name)]
    placed = ((f"{name}[{at}]", text) for at, text in enumerate(documents))
    check_characters((("query", query), *placed), max_characters)
    return RerankTask(
        query,
        documents,
        as_texts=name == "texts",
        top_n=request.top_n or None,
        return_documents=any_is(True, request.return_documents, request.return_text),
        raw_scores=request.raw_scores is True or request.use_activation is False,
        truncate=not any_is(False, request.truncate, request.truncation),
        max_document_tokens=request.max_tokens_per_doc or None,
    )


def text_of(text: Text) -> str:
    return text if isinstance(text, str) else text.text


def any_is(value: bool, *given: bool | None) -> bool:
    """Several services name one thing differently."""
    return any(flag is value for flag in given)


# ---- answers --------------------------------------------------------------------------------------------


def text_answer(task: RerankTask, logits: np.ndarray, shown: np.ndarray) -> list[dict[str, Any]]:
    """text-embeddings-inference: `[{"index", "score", "text"}]`, best first. logits, shown: [documents]."""
    return [
        {"index": position, "score": float(shown[position])}
        | ({"text": task.documents[position]} if task.return_documents else {})
        for position in best_first(logits)[: task.top_n].tolist()
    ]


def document_answer(
    task: RerankTask,
    logits: np.ndarray,
    shown: np.ndarray,
    score_type: ScoreType,
    tokens: int,
    truncated: Sequence[int],
    model: str,
    request_id: str,
) -> dict[str, Any]:
    """Cohere, Jina and vLLM, best first. tokens: scored ones. truncated: positions of documents not read whole.

    `usage` is Jina's, `meta` is Cohere's, `score_type` is ours.
    """
    results = [
        {"index": position, "relevance_score": float(shown[position])}
        | ({"document": {"text": task.documents[position]}} if task.return_documents else {})
        for position in best_first(logits)[: task.top_n].tolist()
    ]
    meta: dict[str, Any] = {"tokens": {"input_tokens": tokens}}
    if truncated:
        meta["warnings"] = [cut_warning(truncated, len(task.documents), "documents", task.place)]
    return {
        "id": request_id,
        "model": model,
        "results": results,
        "score_type": score_type,
        "usage": {"total_tokens": tokens, "prompt_tokens": tokens},
        "meta": meta,
    }
