"""Reading a file of JSON objects, or of other lines, plain or gzipped, with one clear error at the first bad line.

The trap: a corpus is larger than memory, so nothing here keeps a line; `on_bytes` hears of the bytes read from
the disk, which for a gzipped file are fewer than those of the text.
"""

import gzip
import json
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

from rag_retrieval.data.records import DataError


def json_objects(path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> Iterator[tuple[int, dict]]:
    """(line, object) of every line that is not blank, lines counted from 1. Raises DataError with file and line."""
    for line, raw in byte_lines(path, on_bytes):
        text = decoded(raw, f"{path}:{line}")
        if not text.strip():
            continue
        try:
            value = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise DataError(f"{path}:{line}: found broken JSON ({error}); expected one object per line.") from None
        if not isinstance(value, dict):
            raise DataError(f"{path}:{line}: found JSON that is no object; expected one object per line.")
        yield line, value


def text_of(entry: dict, key: str, place: str) -> str:
    """The string under `key`; DataError where it is missing, no string, or half of a character pair."""
    if key not in entry:
        raise DataError(f"{place}: found no {key!r} among the keys {', '.join(map(repr, entry)) or '(none)'}; add it.")
    text = entry[key]
    if not isinstance(text, str):
        raise DataError(f"{place}: {key} is {json.dumps(text)[:30]}; expected a string.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # JSON can write half of a pair: "\ud83d"
        raise DataError(f"{place}: {key} has half of a character ({ascii(text[error.start])}); mend it.") from None
    return text


def decoded(raw: bytes, place: str) -> str:
    """Raises DataError with the place for bytes that are no UTF-8."""
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        found = f"found the byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        raise DataError(f"{place}: {found}; expected UTF-8.") from None


def byte_lines(path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> Iterator[tuple[int, bytes]]:
    """(line, its bytes) of every line, lines counted from 1, without a byte order mark."""
    line = seen = 0
    try:
        with path.open("rb") as file:
            with gzip.open(file) if path.suffix == ".gz" else file as stream:
                for line, raw in enumerate(stream, 1):
                    yield line, _without_mark(raw, path) if line == 1 else raw
                    if line % 1024 == 0:
                        on_bytes(file.tell() - seen)
                        seen = file.tell()
            on_bytes(path.stat().st_size - seen)
    except EOFError:
        raise DataError(f"{path}:{line + 1}: the gzip data ends too early; copy the whole file again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}:{line + 1}: found broken gzip data ({error}); expected a gzip file.") from None
    except OSError as error:
        raise DataError(f"{path}: the file cannot be read ({error.strerror}).") from None


def _without_mark(raw: bytes, path: Path) -> bytes:
    if raw.startswith(b"\x1f\x8b"):
        raise DataError(f"{path}:1: found gzip data; expected plain text: let the file's name end in .gz.")
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{path}:1: found a UTF-16 mark; expected UTF-8: save the file as UTF-8.")
    return raw.removeprefix(b"\xef\xbb\xbf")
