"""A corpus on disk, read in place: texts, ids, metadata, and hashes by which documents are looked up.

`build_corpus` streams documents (`documents`) into a folder of columns (`columns`), `Corpus` maps them. A document is a
row, counted from 0 in the order given.

`text_hash` is of the text without regard to white space and case: two documents with the same one are the same to
mining, whatever their ids.
"""

import hashlib
import json
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from rag_retrieval.data.columns import ColumnWriter, Texts, read_column
from rag_retrieval.data.documents import Document, json_value
from rag_retrieval.data.records import DataError

NUMBERS = {"text.hash": "Q", "id.hash": "Q"}
TEXTS = ("text", "id", "metadata")


def text_hash(text: str) -> int:
    """64 bits of the text without regard to case and to the kind and number of white space."""
    return _hash(" ".join(text.casefold().split()).encode())


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def build_corpus(documents: Iterable[Document], folder: Path) -> "Corpus":
    """Write the columns into the existing folder. Raises DataError for metadata that JSON cannot hold, and where two
    documents have one id."""
    with ColumnWriter(folder, NUMBERS, TEXTS) as writer:
        for document in documents:
            id_ = document.id.encode()
            writer.add_text("text", document.text.encode())
            writer.add_text("id", id_)
            writer.add_text("metadata", _json(document) if document.metadata else b"")
            writer.numbers["text.hash"].append(text_hash(document.text))
            writer.numbers["id.hash"].append(_hash(id_))
    corpus = Corpus(folder)
    _refuse_repeated_ids(corpus)
    return corpus


def _json(document: Document) -> bytes:
    try:
        return json.dumps(document.metadata, ensure_ascii=False, allow_nan=False, default=json_value).encode()
    except (ValueError, TypeError) as error:  # NaN, half of a character pair, bytes
        found = f"{document.place}: found metadata that JSON cannot hold ({error})"
        raise DataError(f"{found}; mend it, or leave it out.") from None


def _refuse_repeated_ids(corpus: "Corpus") -> None:
    hashes, order = corpus.ids_by_hash
    for place in np.flatnonzero(hashes[1:] == hashes[:-1]):
        first, second = int(order[place]), int(order[place + 1])
        if corpus.id(first) == corpus.id(second):
            found = f"documents {first + 1:,} and {second + 1:,} of the corpus have the same id, {corpus.id(first)!r}"
            raise DataError(f"{found}; give each its own.")


class Corpus:
    """Random access to a built corpus. Holds 16 bytes a document for each of the two indexes once used."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._texts, self._ids, self._metadata = (Texts(folder, name) for name in TEXTS)
        self.text_hashes = read_column(folder / "text.hash", "u8")  # uint64 [documents]: `text_hash` of each
        self._id_hashes = read_column(folder / "id.hash", "u8")

    def __len__(self) -> int:
        return len(self._ids)

    def text(self, row: int) -> str:
        return self._texts[row]

    def id(self, row: int) -> str:
        return self._ids[row]

    def metadata(self, row: int) -> dict[str, Any]:
        return json.loads(self._metadata[row] or "{}")

    def document(self, row: int) -> Document:
        return Document(self.id(row), self.text(row), self.metadata(row), f"document {row + 1}")

    def blocks(self, size: int, start: int = 0) -> Iterator[list[str]]:
        """Texts of `size` rows at a time from `start` on, the last block shorter."""
        for begin in range(start, len(self), size):
            yield [self.text(row) for row in range(begin, min(begin + size, len(self)))]

    def metadata_blocks(self, size: int) -> Iterator[list[dict[str, Any]]]:
        """`metadata` of all rows, `size` at a time; a third faster than one by one, since a block is one JSON text."""
        for begin in range(0, len(self), size):
            texts = (self._metadata[row] or "{}" for row in range(begin, min(begin + size, len(self))))
            yield json.loads(f"[{','.join(texts)}]")

    def row_of_id(self, id_: str) -> int | None:
        hashes, order = self.ids_by_hash
        rows = _rows_with(_hash(id_.encode()), hashes, order)
        return next((row for row in rows if self.id(row) == id_), None)

    def row_of_text(self, text: str) -> int | None:
        """The first document that is this text, white space and case aside."""
        return next(iter(_rows_with(text_hash(text), *self._texts_by_hash)), None)

    @cached_property
    def ids_by_hash(self) -> tuple[np.ndarray, np.ndarray]:
        return _sorted_with_rows(self._id_hashes)

    @cached_property
    def _texts_by_hash(self) -> tuple[np.ndarray, np.ndarray]:
        return _sorted_with_rows(self.text_hashes)


def _sorted_with_rows(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(hashes, kind="stable")  # stable: of equal hashes the first row comes first
    return hashes[order], order


def _rows_with(value: int, hashes: np.ndarray, order: np.ndarray) -> list[int]:
    value = np.uint64(value)
    return order[np.searchsorted(hashes, value) : np.searchsorted(hashes, value, side="right")].tolist()
