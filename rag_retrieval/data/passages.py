"""Plain texts to pre-train on, cut into passages: read once, cached, mapped by all processes that read them.

Whatever `documents` reads is a source: rows or texts. A document that is too long is cut at the ends of paragraphs and
sentences, so that every part of it is read.
"""

import logging
import os
import shutil
import uuid
from collections.abc import Iterable
from functools import cached_property
from pathlib import Path

import numpy as np
from filelock import FileLock

from rag_retrieval.core.files import digest_of
from rag_retrieval.data.columns import ColumnWriter, Texts, read_column
from rag_retrieval.data.corpus import text_hash
from rag_retrieval.data.documents import Document, cut_passages, read_documents, row_file, text_files
from rag_retrieval.data.records import DataError
from rag_retrieval.data.store import cache_folder

logger = logging.getLogger(__name__)

FORMAT_VERSION = 1


class Passages:
    """Random access to a folder that `open_passages` made. Pickles as the path alone."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __getstate__(self) -> dict:
        return {"folder": self.folder}

    def __len__(self) -> int:
        return len(self.document_hashes)

    def text(self, place: int) -> str:
        return self._texts[place]

    def document_id(self, place: int) -> str:
        """That of the document which the passage is from; a passage of a text file is one itself."""
        return self._ids[place]

    @cached_property
    def document_hashes(self) -> np.ndarray:
        """uint64 [passages]: `text_hash` of the document that each is from."""
        return read_column(self.folder / "document", "u8")

    @property
    def files(self) -> list[Path]:
        """The columns: equal contents are equal passages."""
        return [self.folder / name for name in ("document", "id", "id.offsets", "text", "text.offsets")]

    @cached_property
    def _texts(self) -> Texts:
        return Texts(self.folder, "text")

    @cached_property
    def _ids(self) -> Texts:
        return Texts(self.folder, "id")


def open_passages(source: str | Path, passage_tokens: int, cache_dir: Path | None = None) -> Passages:
    """The passages of a source, read unless the cache has them. Raises DataError as `read_documents` does.

    passage_tokens: of a passage at most, as `documents` counts them. cache_dir: see `cache_folder`. The cache knows a
    source by the paths, sizes and times of its files. Memory does not grow with the source.
    """
    made_from = [FORMAT_VERSION, _identity(Path(source)), passage_tokens]
    folder = cache_folder(cache_dir) / f"passages-{digest_of(made_from)}"
    # all processes of a run come here at once; the first builds and the others find the result
    with FileLock(f"{folder}.lock"):
        if not folder.exists():
            temporary = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex[:8]}")
            temporary.mkdir()
            try:
                build_passages(read_documents(source, passage_tokens), temporary, passage_tokens, str(source))
                temporary.rename(folder)
            finally:
                shutil.rmtree(temporary, ignore_errors=True)
    return Passages(folder)


def _identity(source: Path) -> list[tuple[str, int, int]]:
    rows = row_file(source)
    files = text_files(source) if rows is None else [rows]
    states = [(file, os.stat(file)) for file in files]
    return [(str(file.resolve()), state.st_size, state.st_mtime_ns) for file, state in states]


def build_passages(documents: Iterable[Document], folder: Path, passage_tokens: int, name: str) -> None:
    """Write the columns into the existing folder. name: of the source, for messages. Raises DataError where there is no
    text; documents without any are counted in the log."""
    found = empty = 0
    with ColumnWriter(folder, {"document": "Q"}, ("text", "id")) as writer:
        for document in documents:
            id_, own_hash = document.id.encode(), text_hash(document.text)
            passages = list(cut_passages(document.text, passage_tokens))
            for start, end in passages:
                writer.add_text("text", document.text[start:end].encode())
                writer.add_text("id", id_)
                writer.numbers["document"].append(own_hash)
            found, empty = found + len(passages), empty + (not passages)
    if not found:
        raise DataError(f"{name}: no document has any text; expected at least one.")
    if empty:
        logger.warning("%s: %s documents have no text and are left out", name, f"{empty:,}")
