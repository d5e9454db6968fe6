"""What may be a corpus, read one document after another: files of rows, folders in BEIR layout, folders of texts.

    NAME.jsonl, .json (each also .gz), .parquet    `_id` or `id`, `title` (optional), `text`; all else is metadata
    a folder with corpus.jsonl[.gz]                the same rows, each with an id, as BEIR has them
    NAME.txt, NAME.md, or a folder of them         cut into passages; metadata says where in which file they stand

A row without an id is called after its file and line, `corpus.jsonl#17`, a passage after its file and number,
`guide/setup.md#3`, both counted from 1.

Tokens that limit a passage belong to no model, so that models can be compared on the same passages: a token is a word
(a long one: each 16 letters of it), a mark, or a character of a script that puts no spaces between words.
"""

import logging
from collections.abc import Iterator
from datetime import date, time
from pathlib import Path
from typing import Any, NamedTuple

import regex

from rag_retrieval.core.files import content_of, digest_of
from rag_retrieval.core.log import Progress
from rag_retrieval.data.beir import document_text, find_optional
from rag_retrieval.data.readers import SUFFIXES, entry_text, row_objects
from rag_retrieval.data.records import DataError
from rag_retrieval.data.words import UNSPACED

logger = logging.getLogger(__name__)

TEXT_SUFFIXES = (".txt", ".md")
ROW_SUFFIXES = tuple(suffix for suffix in SUFFIXES if not suffix.startswith(".tsv"))
PASSAGE_TOKENS = 200  # of which most models make at most 512 of theirs

_UNSPACED = rf"(?:\p{{Han}}|{UNSPACED})"
_TOKEN = regex.compile(rf"{_UNSPACED}|(?:(?!{_UNSPACED})\w){{1,16}}|[^\w\s]")
_BLANK_LINES = regex.compile(r"(?:\r?\n[ \t]*){2,}")
_HEADING = regex.compile(r"\s*#{1,6} [^\n]*\s*")
SENTENCE_END = regex.compile(r"[。!?！？…]|\.(?=\s)|\.\Z")


class Document(NamedTuple):
    """text: with its title before it. metadata: what JSON can write. place: file and line, for messages."""

    id: str
    text: str
    metadata: dict[str, Any]
    place: str


def read_documents(source: str | Path, passage_tokens: int = PASSAGE_TOKENS) -> Iterator[Document]:
    """Every document, in the order of the file; files of a folder by their names.

    passage_tokens: of a passage of a text file, at most. Raises DataError for a source that is none of the above, at
    the first bad row, and where there is no document.
    """
    source, found = Path(source), False
    rows = row_file(source)
    documents = _passages(source, passage_tokens) if rows is None else _rows(rows, needs_ids=source.is_dir())
    for document in documents:
        found = True
        yield document
    if not found:
        raise DataError(f"{rows or source}: found no documents; expected at least one.")


def row_file(source: Path) -> Path | None:
    """The file of rows that a source is, or that a folder in BEIR layout has; None for texts and everything else."""
    if source.is_dir():
        return find_optional(source, "corpus.jsonl")
    return source if source.is_file() and source.name.lower().endswith(ROW_SUFFIXES) else None


def source_content(source: str | Path) -> str:
    """A digest of what `read_documents` reads. Raises DataError as it does for a source that is not there."""
    source = Path(source)
    rows = row_file(source)
    if rows is not None:
        return content_of(rows)
    return digest_of([(str(file.relative_to(source)), content_of(file)) for file in text_files(source)])


def _rows(file: Path, needs_ids: bool) -> Iterator[Document]:
    with Progress(file.stat().st_size, "reading the corpus", "B") as progress:
        for line, entry in row_objects(file, progress.update):
            place = f"{file}:{line}"
            yield Document(
                _id(entry, place) if needs_ids or "_id" in entry or "id" in entry else f"{file.name}#{line}",
                document_text(entry, place),
                _metadata(entry),
                place,
            )


def _id(entry: dict, place: str) -> str:
    name = "id" if "id" in entry and "_id" not in entry else "_id"
    if type(entry.get(name)) is int:
        return str(entry[name])
    if entry.get(name) == "":
        raise DataError(f"{place}: {name} is empty; give the document one, or leave the key out.")
    return entry_text(entry, name, place)


def _metadata(entry: dict) -> dict[str, Any]:
    """Every key of the row that is not a document's own, and what its `metadata` holds where that is an object."""
    own = {"_id" if "_id" in entry else "id", "title", "text"}
    rest = {key: value for key, value in entry.items() if key not in own}
    if not isinstance(rest.get("metadata", {}), dict | None):
        return rest
    return (rest.pop("metadata", None) or {}) | rest


def json_value(value: Any) -> Any:
    """For `json.dumps`: the dates and times that Parquet has as ISO 8601."""
    if isinstance(value, date | time):
        return value.isoformat()
    raise TypeError(f"found a value of the type {type(value).__name__}")


# ---- passages of texts


def _passages(source: Path, passage_tokens: int) -> Iterator[Document]:
    root = source if source.is_dir() else source.parent
    files = text_files(source)
    with Progress(sum(file.stat().st_size for file in files), "reading the corpus", "B") as progress:
        for file in files:
            try:
                text = file.read_bytes().decode("utf-8-sig")
            except UnicodeDecodeError as error:
                found = f"found the byte 0x{error.object[error.start]:02x} at byte offset {error.start}"
                raise DataError(f"{file}: {found}; expected UTF-8.") from None
            name = file.relative_to(root).as_posix()
            number = 0
            for number, (start, end) in enumerate(cut_passages(text, passage_tokens), 1):
                metadata = {"file": name, "start": start, "end": end}
                yield Document(f"{name}#{number}", text[start:end], metadata, f"{file}, passage {number}")
            if not number:
                logger.warning("%s: there is no text in it", file)
            progress.update(file.stat().st_size)


def text_files(source: Path) -> list[Path]:
    """Raises DataError for a source that is neither a text file nor a folder with some. Hidden files do not count."""
    if source.is_file() and source.name.lower().endswith(TEXT_SUFFIXES):
        return [source]
    expected = f"expected {', '.join(ROW_SUFFIXES)}, a folder in BEIR layout, or {' or '.join(TEXT_SUFFIXES)} files"
    if not source.is_dir():
        found = f"found the suffix {source.suffix!r}" if source.is_file() else "no such file or folder"
        raise DataError(f"{source}: {found}; {expected}.")
    files = sorted(
        path
        for path in source.rglob("*")
        if path.name.lower().endswith(TEXT_SUFFIXES) and path.is_file()
        and not any(part.startswith(".") for part in path.relative_to(source).parts)
    )  # fmt: skip
    for file in files:
        try:
            str(file.relative_to(source)).encode()
        except UnicodeEncodeError:
            raise DataError(f"{ascii(str(file))}: the name has bytes that are no UTF-8; rename it.") from None
    if not files:
        raise DataError(f"{source}: found neither corpus.jsonl nor corpus.jsonl.gz, nor texts in it; {expected}.")
    return files


def cut_passages(text: str, limit: int) -> Iterator[tuple[int, int]]:
    """(start, end) of each passage, in characters: as many whole paragraphs as have `limit` tokens together, or a part
    of one that alone has more. A heading of Markdown stays with the paragraph after it."""
    first = last = tokens = 0
    for start, end, count in _pieces(text, limit):
        if tokens and tokens + count > limit:
            yield first, last
            tokens = 0
        first, last, tokens = (first if tokens else start), end, tokens + count
    if tokens:
        yield first, last


def _pieces(text: str, limit: int) -> Iterator[tuple[int, int, int]]:
    """(start, end, tokens) of the paragraphs; of one that has too many, of parts that end with a sentence where one
    ends in the second half."""
    for start, end in _paragraphs(text):
        tokens = [match.span() for match in _TOKEN.finditer(text, start, end)]
        begin = 0
        while begin < len(tokens):
            stop = min(begin + limit, len(tokens))
            if stop < len(tokens):
                ends = range(stop, begin + limit // 2, -1)
                stop = next((place for place in ends if SENTENCE_END.match(text, tokens[place - 1][0])), stop)
            yield tokens[begin][0], tokens[stop - 1][1], stop - begin
            begin = stop


def _paragraphs(text: str) -> Iterator[tuple[int, int]]:
    start = begin = 0
    for blank in _BLANK_LINES.finditer(text):
        if not _HEADING.fullmatch(text, begin, blank.start()):
            yield start, blank.start()
            start = blank.end()
        begin = blank.end()
    yield start, len(text)
