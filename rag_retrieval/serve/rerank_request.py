"""What a client asks: one of two shapes of JSON, read into one `RerankRequest`.

`documents` is the key of Cohere and Jina, `texts` that of text-embeddings-inference. What a reader would get wrong:
keys that we do not know are ignored, as those services do, but a key that would change the scores there and would not
here is refused.
"""

import json
from dataclasses import dataclass
from typing import Any

from rag_retrieval.serve.refusal import Refusal

IGNORED_UNLESS_CHANGING = {"rank_fields": ["text"], "truncation_direction": "right"}  # key -> what it may say


@dataclass(frozen=True)
class RerankRequest:
    """text_shape: asked as text-embeddings-inference is, so the answer is a bare list. raw_scores: logits instead of
    probabilities. truncate: False refuses a pair that is too long instead of cutting it. top_n, max_document_tokens:
    at least 1, None for all."""

    query: str
    documents: list[str]
    text_shape: bool
    top_n: int | None = None
    return_documents: bool = False
    raw_scores: bool = False
    truncate: bool = True
    max_document_tokens: int | None = None


@dataclass(frozen=True)
class TextLimits:
    documents: int
    characters: int


def parse_request(body: bytes, limits: TextLimits) -> RerankRequest:
    """Raises Refusal: 400 for what is no JSON, 422 for a field, named with its position, that is not as expected."""
    try:
        data = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Refusal(400, f"the body is no JSON: {error}") from error
    if not isinstance(data, dict):
        raise Refusal(422, f'expected an object such as {{"query": "...", "documents": ["..."]}}, found {kind(data)}')
    given = [key for key in ("documents", "texts") if data.get(key) is not None]
    if len(given) != 1:
        raise Refusal(422, f"expected either documents or texts, found {'both' if given else 'neither'}")
    for key, accepted in IGNORED_UNLESS_CHANGING.items():
        value = data.get(key)
        if value is not None and lowered(value) != accepted:
            raise Refusal(422, f"{key}: {accepted!r} is the one value that this server knows; leave the key out")
    query = text_of(data.get("query"), "query", limits.characters)
    return read_fields(data, query, documents_of(data[given[0]], given[0], limits), given[0] == "texts")


def read_fields(data: dict[str, Any], query: str, documents: list[str], text_shape: bool) -> RerankRequest:
    if text_shape:
        return RerankRequest(
            query,
            documents,
            text_shape,
            return_documents=flag_of(data, "return_text", False),
            raw_scores=flag_of(data, "raw_scores", False),
            truncate=flag_of(data, "truncate", True),
        )
    return RerankRequest(
        query,
        documents,
        text_shape,
        top_n=count_of(data, "top_n"),
        return_documents=flag_of(data, "return_documents", False),
        max_document_tokens=count_of(data, "max_tokens_per_doc"),
    )


def documents_of(value: Any, name: str, limits: TextLimits) -> list[str]:
    if not isinstance(value, list):
        raise Refusal(422, f"{name}: expected a list, found {kind(value)}")
    if len(value) > limits.documents:
        raise Refusal(422, f"{name}: found {len(value)}, at most {limits.documents} are taken; send them in parts")
    return [text_of(entry, f"{name}[{position}]", limits.characters) for position, entry in enumerate(value)]


def text_of(value: Any, place: str, most_characters: int) -> str:
    text = value.get("text") if isinstance(value, dict) else value
    if not isinstance(text, str):
        found = f'an object whose "text" is {kind(text)}' if isinstance(value, dict) else kind(value)
        raise Refusal(422, f'{place}: expected a string or an object with "text", found {found}')
    if len(text) > most_characters:
        raise Refusal(422, f"{place}: found {len(text)} characters, at most {most_characters} are taken; cut it")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Refusal(422, f"{place}: holds half a surrogate pair, which is no text") from None
    return text


def flag_of(data: dict[str, Any], key: str, default: bool) -> bool:
    value = data.get(key)
    if value is None:
        return default
    if not isinstance(value, bool):
        raise Refusal(422, f"{key}: expected true or false, found {kind(value)}")
    return value


def count_of(data: dict[str, Any], key: str) -> int | None:
    value = data.get(key)
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        shown = value if isinstance(value, (int, float)) and not isinstance(value, bool) else kind(value)
        raise Refusal(422, f"{key}: expected a whole number of at least 1, found {shown}")
    return value


def lowered(value: Any) -> Any:
    return value.lower() if isinstance(value, str) else value


def kind(value: Any) -> str:
    """What JSON calls it."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false", type(None): "nothing"}
    return names.get(type(value), "a number")
