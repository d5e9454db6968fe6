"""Queries, documents and pairs as callers give them, checked before anything is computed.

One [query, document] is taken as a list of one pair: two strings in a list are a pair, never two pairs. A document
without text (None, "", white space) is not an error: it keeps its place and its id, is not read by the model, and gets
the lowest score.
"""

from collections.abc import Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

OWN_KEYS = ("text", "id", "metadata")  # of a document that is a dict


def check_pairs(pairs) -> list[tuple[str, str]]:
    """The pairs as a list of tuples; a single [query, document] becomes a list of one.

    Raises ValueError naming the position of the first that is not a pair, and what stands there.
    """
    pairs = check_list("pairs", pairs)
    if len(pairs) == 2 and all(isinstance(text, str) for text in pairs):
        pairs = [pairs]
    return [check_pair(position, pair) for position, pair in enumerate(pairs)]


def check_list(name: str, values) -> list:
    """The values as a list. ValueError for a single text, for a mapping or a set, which have no positions, for a table
    (pandas, polars, pyarrow), which gives its columns and not its rows, and for what cannot be iterated."""
    if hasattr(values, "columns"):
        raise ValueError(
            f"{name}: found a {type(values).__name__}, whose columns these would be; give a list of its rows, such as "
            "frame[COLUMNS].values.tolist()"
        )
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        raise ValueError(f"{name}: expected a list, found {type(values).__name__}")
    return list(values)


def check_pair(position: int, pair) -> tuple[str, str]:
    if isinstance(pair, (str, bytes)) or not isinstance(pair, (Sequence, np.ndarray)) or len(pair) != 2:
        raise ValueError(f"pairs[{position}] must be [query, document], found {pair!r:.100}")
    for name, text in zip(("query", "document"), pair, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"pairs[{position}]: the {name} must be a string, found {type(text).__name__}")
        if not is_unicode(text):
            raise ValueError(
                f"pairs[{position}]: the {name} holds half a surrogate pair, which is no text: {text!a:.100}"
            )
    return pair[0], pair[1]


def is_unicode(text: str) -> bool:
    """False for a lone surrogate, as a broken JSON escape gives: tokenizers cannot read it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


@dataclass(frozen=True)
class Document:
    """text: "" for None. metadata: what stood beside text and id."""

    doc_id: Any
    text: str
    metadata: dict

    @property
    def is_empty(self) -> bool:
        return not self.text.strip()


def check_number(name: str, value, least: int, unit: str) -> None:
    """ValueError for anything but a whole number of at least `least`, for True and False too."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name} must be a whole number of {unit}, at least {least}; found {value!r}")


def check_flag(name: str, value) -> None:
    """ValueError for anything but True and False: every text that is not empty, "false" too, would count as true."""
    if not isinstance(value, (bool, np.bool_)):
        raise ValueError(f"{name} must be True or False, found {value!r:.100}")


def check_text(name: str, text) -> str:
    if not isinstance(text, str):
        raise ValueError(f"{name}: expected a string, found {type(text).__name__}")
    if not is_unicode(text):
        raise ValueError(f"{name}: half a surrogate pair in it, which is no text: {text!a:.100}")
    return text


def check_documents(name: str, documents) -> list[Document]:
    """Raises ValueError naming the position, as `documents[3]`, of the first that is not one."""
    checked = []
    for position, document in enumerate(check_list(name, documents)):
        place = f"{name}[{position}]"
        if isinstance(document, Mapping):
            checked.append(check_mapping(place, position, document))
        elif document is None or isinstance(document, str):
            checked.append(Document(position, check_text(place, document or ""), {}))
        else:
            kind = type(document).__name__
            raise ValueError(f'{place}: expected a string, a dict with "text" or None, found {kind}')
    return checked


def check_mapping(name: str, position: int, document: Mapping) -> Document:
    if "text" not in document:
        keys = ", ".join(map(repr, document)) or "no keys"
        raise ValueError(f'{name}: expected a dict with "text", found {keys}')
    text, metadata = document["text"], document.get("metadata")
    if text is not None and not isinstance(text, str):
        raise ValueError(f'{name}: "text" must be a string or None, found {type(text).__name__}')
    if metadata is not None and not isinstance(metadata, Mapping):
        raise ValueError(f'{name}: "metadata" must be a dict, found {type(metadata).__name__}')
    others = {key: value for key, value in document.items() if key not in OWN_KEYS}
    doc_id = document.get("id")
    return Document(position if doc_id is None else doc_id, check_text(name, text or ""), others | dict(metadata or {}))
