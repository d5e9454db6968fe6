"""A corpus on disk, read in place: texts, ids, and hashes by which documents are looked up.

`build_corpus` streams a corpus file into a folder of columns (`columns`), `Corpus` maps them. A document is a row,
counted from 0 in the file's order; its text is title, space and body, or the body alone without a title.

`text_hash` is of the text without regard to white space and case: two documents with the same one are the same to
mining, whatever their ids.
"""

import hashlib
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from rag_retrieval.core.log import Progress
from rag_retrieval.data.beir import document_text
from rag_retrieval.data.columns import ColumnWriter, Texts, read_column
from rag_retrieval.data.readers import entry_text, json_objects
from rag_retrieval.data.records import DataError

NUMBERS = {"text.hash": "Q", "id.hash": "Q", "line": "q"}  # line: in the corpus file, from 1


def text_hash(text: str) -> int:
    """64 bits of the text without regard to case and to the kind and number of white space."""
    return _hash(" ".join(text.casefold().split()).encode())


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def build_corpus(source: Path, folder: Path, needs_ids: bool) -> None:
    """Write the columns of a corpus file into the existing folder; DataError at the first bad line.

    needs_ids: whether every line must have an `_id` of its own; without, a line lacking one gets "".
    """
    with (
        ColumnWriter(folder, NUMBERS, ("text", "id")) as writer,
        Progress(source.stat().st_size, "reading the corpus", "B") as progress,
    ):
        for line, entry in json_objects(source, progress.update):
            place = f"{source}:{line}"
            id_ = entry_text(entry, "_id", place).encode() if needs_ids or "_id" in entry else b""
            text = document_text(entry, place)
            writer.add_text("text", text.encode())
            writer.add_text("id", id_)
            writer.numbers["text.hash"].append(text_hash(text))
            writer.numbers["id.hash"].append(_hash(id_))
            writer.numbers["line"].append(line)
    if not (folder / "line").stat().st_size:
        raise DataError(f"{source}: found no documents; expected one per line.")
    if needs_ids:
        _refuse_repeated_ids(Corpus(folder), source)


def _refuse_repeated_ids(corpus: "Corpus", source: Path) -> None:
    hashes, order = corpus.ids_by_hash
    for place in np.flatnonzero(hashes[1:] == hashes[:-1]):
        first, second = int(order[place]), int(order[place + 1])
        if corpus.id(first) == corpus.id(second):
            found = f"the _id {corpus.id(first)!r} is already that of line {corpus.lines[first]}"
            raise DataError(f"{source}:{corpus.lines[second]}: {found}; give each document its own.")


class Corpus:
    """Random access to a built corpus. Holds 16 bytes a document for each of the two indexes once used."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __len__(self) -> int:
        return len(self.lines)

    def text(self, row: int) -> str:
        return self._texts[row]

    def id(self, row: int) -> str:
        return self._ids[row]

    def blocks(self, size: int, start: int = 0) -> Iterator[list[str]]:
        """Texts of `size` rows at a time from `start` on, the last block shorter."""
        for begin in range(start, len(self), size):
            yield [self.text(row) for row in range(begin, min(begin + size, len(self)))]

    def row_of_id(self, id_: str) -> int | None:
        hashes, order = self.ids_by_hash
        rows = _rows_with(_hash(id_.encode()), hashes, order)
        return next((row for row in rows if self.id(row) == id_), None)

    def row_of_text(self, text: str) -> int | None:
        """The first document that is this text, white space and case aside."""
        return next(iter(_rows_with(text_hash(text), *self._texts_by_hash)), None)

    @cached_property
    def lines(self) -> np.ndarray:
        return read_column(self.folder / "line", "i8")

    @cached_property
    def text_hashes(self) -> np.ndarray:
        """uint64 [documents]: `text_hash` of each."""
        return read_column(self.folder / "text.hash", "u8")

    @cached_property
    def ids_by_hash(self) -> tuple[np.ndarray, np.ndarray]:
        return _sorted_with_rows(read_column(self.folder / "id.hash", "u8"))

    @cached_property
    def _texts_by_hash(self) -> tuple[np.ndarray, np.ndarray]:
        return _sorted_with_rows(self.text_hashes)

    @cached_property
    def _texts(self) -> Texts:
        return Texts(self.folder, "text")

    @cached_property
    def _ids(self) -> Texts:
        return Texts(self.folder, "id")


def _sorted_with_rows(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(hashes, kind="stable")  # stable: of equal hashes the first row comes first
    return hashes[order], order


def _rows_with(value: int, hashes: np.ndarray, order: np.ndarray) -> list[int]:
    value = np.uint64(value)
    return order[np.searchsorted(hashes, value) : np.searchsorted(hashes, value, side="right")].tolist()
