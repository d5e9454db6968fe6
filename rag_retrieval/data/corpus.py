"""A corpus on disk, read in place: texts, ids, and hashes by which documents are found and told apart.

`build_corpus` streams a corpus file into a folder of flat columns, `Corpus` maps them. A document is a row,
counted from 0 in the file's order; its text is title, space and body, or the body alone without a title.

The trap: `text_hash` is of the normalised text (white space and case do not count), `text` is as it was. Two
documents with the same `text_hash` are the same to mining, whatever their ids.
"""

import hashlib
from array import array
from collections.abc import Iterator
from functools import cached_property
from pathlib import Path

import numpy as np

from rag_retrieval.core.log import Progress
from rag_retrieval.data.beir import document_text
from rag_retrieval.data.readers import entry_text, json_objects
from rag_retrieval.data.records import DataError

COLUMNS = {
    "text": "u1",  # UTF-8, end to end
    "text.end": "i8",  # [documents] into text
    "text.hash": "u8",
    "id": "u1",
    "id.end": "i8",
    "id.hash": "u8",
    "line": "i8",  # in the corpus file, from 1
}


def text_hash(text: str) -> int:
    """64 bits of the text without regard to case and to the kind and number of white space."""
    return _hash(" ".join(text.casefold().split()).encode())


def _hash(content: bytes) -> int:
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")


def build_corpus(source: Path, folder: Path, needs_ids: bool) -> None:
    """Write the columns of a corpus file into the existing folder; DataError at the first bad line.

    needs_ids: whether every line must have an `_id` of its own; without, a line lacking one gets "".
    """
    writers = {name: (folder / name).open("wb") for name in COLUMNS}
    ends = {"text": 0, "id": 0}
    try:
        with Progress(source.stat().st_size, "reading the corpus", "B") as progress:
            for line, entry in json_objects(source, progress.update):
                place = f"{source}:{line}"
                id_ = entry_text(entry, "_id", place) if needs_ids or "_id" in entry else ""
                text = document_text(entry, place)
                for name, content in (("text", text.encode()), ("id", id_.encode())):
                    ends[name] += len(content)
                    writers[name].write(content)
                    writers[f"{name}.end"].write(array("q", [ends[name]]).tobytes())
                hashes = array("Q", [text_hash(text)]), array("Q", [_hash(id_.encode())])
                writers["text.hash"].write(hashes[0].tobytes())
                writers["id.hash"].write(hashes[1].tobytes())
                writers["line"].write(array("q", [line]).tobytes())
    finally:
        for writer in writers.values():
            writer.close()
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
        return self._cut("text", row).decode()

    def id(self, row: int) -> str:
        return self._cut("id", row).decode()

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
        return self._column("line")

    @cached_property
    def text_hashes(self) -> np.ndarray:
        """uint64 [documents]: `text_hash` of each."""
        return self._column("text.hash")

    @cached_property
    def ids_by_hash(self) -> tuple[np.ndarray, np.ndarray]:
        return _sorted_with_rows(self._column("id.hash"))

    @cached_property
    def _texts_by_hash(self) -> tuple[np.ndarray, np.ndarray]:
        return _sorted_with_rows(self.text_hashes)

    @cached_property
    def _ends(self) -> dict[str, np.ndarray]:
        return {name: self._column(f"{name}.end") for name in ("text", "id")}

    @cached_property
    def _contents(self) -> dict[str, np.ndarray]:
        return {name: self._column(name) for name in ("text", "id")}

    def _cut(self, name: str, row: int) -> bytes:
        ends = self._ends[name]
        return self._contents[name][ends[row - 1] if row else 0 : ends[row]].tobytes()

    def _column(self, name: str) -> np.ndarray:
        path = self.folder / name
        if path.stat().st_size == 0:  # an empty file cannot be mapped
            return np.empty(0, COLUMNS[name])
        return np.asarray(np.memmap(path, COLUMNS[name], "r"))  # a plain array: slicing a memmap is slow


def _sorted_with_rows(hashes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    order = np.argsort(hashes, kind="stable")  # stable: of equal hashes the first row comes first
    return hashes[order], order


def _rows_with(value: int, hashes: np.ndarray, order: np.ndarray) -> list[int]:
    value = np.uint64(value)
    return order[np.searchsorted(hashes, value) : np.searchsorted(hashes, value, side="right")].tolist()
