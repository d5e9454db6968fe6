"""Files and hub data sets as streams of records or JSON objects, with file and line in every error.

`FORMATS` is the one table of file formats: a reader yields (line, row) for each row, lines counted from 1, where a row
that cannot be decoded is a RecordError. To add a format, write its reader and its entry here.
"""

import gzip
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from rag_retrieval.core.config import Location
from rag_retrieval.data.records import BadLines, DataError, Record, RecordError, RecordRules, parse_record, text_of

if TYPE_CHECKING:
    import pyarrow as pa

Rows = Iterator[tuple[int, object]]

HUB_OPTIONS = re.compile("[@#]")  # what stands before the revision and the configuration of a hub data set
OTHER_FILE_SUFFIXES = (".csv", ".txt", ".gz", ".zip", ".arrow")  # files too, which are refused by name


class _SourceError(Exception):
    """A fault that ends the reading of a source at a line (None: before any line)."""

    def __init__(self, line: int | None, message: str):
        self.line, self.message = line, message


# ---- the formats


def byte_lines(path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> Iterator[tuple[int, bytes]]:
    """(line, its bytes) of a file, plain or gzipped, without a byte order mark. A line ends at \\n and nothing else.

    on_bytes: called now and then with the bytes read from the disk since the last call, compressed ones for .gz.
    Raises _SourceError where no further line can be read.
    """
    line = seen = 0
    try:
        with path.open("rb") as file:
            with gzip.open(file) if path.suffix.lower() == ".gz" else file as stream:
                for line, raw in enumerate(stream, 1):
                    yield line, _without_mark(raw) if line == 1 else raw
                    if line % 1024 == 0:
                        on_bytes(file.tell() - seen)
                        seen = file.tell()
            on_bytes(path.stat().st_size - seen)
    except EOFError:
        raise _SourceError(line + 1, "the gzip data ends too early; copy the whole file again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _SourceError(line + 1, f"found broken gzip data ({error}); expected a gzip file.") from None
    except OSError as error:
        raise _SourceError(None, f"the file cannot be read ({error.strerror}).") from None


def _without_mark(raw: bytes) -> bytes:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _SourceError(1, "found a UTF-16 mark; expected UTF-8: save the file as UTF-8.")
    if raw.startswith(b"\x1f\x8b"):
        raise _SourceError(1, "found gzip data; expected plain text: let the file's name end in .gz.")
    return raw.removeprefix(b"\xef\xbb\xbf")


def _json_rows(path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> Rows:
    is_first = True
    for line, raw in byte_lines(path, on_bytes):
        if not raw.strip():
            continue
        if is_first and raw.lstrip().startswith(b"["):
            if not path.name.lower().endswith((".json", ".json.gz")):
                raise _SourceError(line, "found a JSON list; expected one record per line: let the name end in .json.")
            yield from _array_rows(b"".join(raw for _, raw in byte_lines(path)))
            return
        is_first = False
        yield line, _decode_json(raw)


def _array_rows(raw: bytes) -> Rows:
    """The elements of one JSON array, each with the line that it begins on. Holds the whole text in memory."""
    try:
        text = raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise _SourceError(line, f"found the byte 0x{raw[error.start]:02x}; expected UTF-8.") from None
    place, line, expected = 0, 1, "["
    while True:
        found = _SEPARATOR.match(text, place)
        mark, end = found.groups()
        line += text.count("\n", place, found.start(2) if end else found.end())
        if end and mark in ("", "["):
            return
        if end or mark != expected:
            raise _SourceError(line, "found broken JSON; expected one array of records with commas between them.")
        try:
            row, place = _JSON.raw_decode(text, found.end())
        except (ValueError, RecursionError) as error:
            raise _SourceError(line, f"found a record that cannot be read ({error}); expected one object.") from None
        yield line, row
        line, expected = line + text.count("\n", found.end(), place), ","


def _decode_json(raw: bytes) -> object:
    try:
        return _JSON.decode(decoded(raw))
    except RecordError as error:
        return error
    except json.JSONDecodeError as error:
        where = f"at column {error.colno} ({error.msg})"
        return RecordError(f"found broken JSON {where}; expected one whole object per line.")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or deep nesting
        return RecordError(f"found JSON that cannot be read ({error}); expected one record.")


def unique_object(pairs: list[tuple[str, object]]) -> dict:
    """For `object_pairs_hook` of json. Raises RecordError for a key that stands twice."""
    entry = dict(pairs)
    if len(entry) < len(pairs):
        raise RecordError(_repeated("key", [key for key, _ in pairs]))
    return entry


_SEPARATOR = re.compile(r"\s*([\[,]?)\s*(\]\s*\Z)?")  # before an element of an array, or at the end of the array
_JSON = json.JSONDecoder(object_pairs_hook=unique_object)  # json.loads would make one for each line


def _repeated(what: str, names: list[str]) -> str:
    name = next(name for name, count in Counter(names).items() if count > 1)
    return f"found the {what} {name!r} twice; keep one."


def decoded(raw: bytes) -> str:
    """A line without its end. Raises RecordError for bytes that are no UTF-8."""
    try:
        return raw.decode().rstrip("\r\n")
    except UnicodeDecodeError as error:
        byte = f"found the byte 0x{raw[error.start]:02x} at column {error.start + 1}"
        raise RecordError(f"{byte}; expected UTF-8.") from None


def _triple_rows(path: Path) -> Rows:
    """MS MARCO's triples: query, positive, negative between tabs, perhaps under a header of these names."""
    columns = ["query", "positive", "negative"]
    is_first = True
    for line, raw in byte_lines(path):
        if not raw.strip():
            continue
        try:
            fields = decoded(raw).split("\t")
        except RecordError as error:
            yield line, error
            continue
        if is_first and (all(field.strip().isdigit() for field in fields) or fields[0] == "query-id"):
            raise _SourceError(
                line, f"found {', '.join(fields)[:60]}: ids; expected texts: look the ids up in the collection first."
            )
        if is_first and [field.lower() for field in fields] == columns:
            is_first = False
            continue
        is_first = False
        if len(fields) == len(columns):
            yield line, dict(zip(columns, fields, strict=True))
        else:
            found = f"found {len(fields)} column{'s' if len(fields) > 1 else ''} between tabs"
            yield line, RecordError(f"{found}; expected query, positive, negative.")


def _parquet_rows(path: Path) -> Rows:
    import pyarrow as pa  # 0.2 s, which a command's help need not take
    import pyarrow.parquet as pq

    row = 0
    try:
        with pq.ParquetFile(path, memory_map=True, page_checksum_verification=True) as file:
            _refuse_repeated_columns(pa.struct(file.schema_arrow))
            for batch in file.iter_batches(batch_size=1024):
                for data in _batch_rows(batch):
                    row += 1
                    yield row, data
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise _SourceError(row + 1, f"found broken Parquet data ({reason}); expected a whole file.") from None


def _refuse_repeated_columns(kind: "pa.DataType") -> None:
    """In a struct, or in one inside it: `to_pylist` would keep the last column of a name."""
    fields = [kind.field(place) for place in range(kind.num_fields)]
    names = [field.name for field in fields]
    if len(set(names)) < len(names):
        raise _SourceError(1, _repeated("column", names))
    for field in fields:
        _refuse_repeated_columns(field.type)


def _batch_rows(batch: "pa.RecordBatch") -> list:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # find the rows that are at fault
        return [_batch_row(batch, index) for index in range(batch.num_rows)]


def _batch_row(batch: "pa.RecordBatch", index: int) -> object:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        byte = f"found the byte 0x{error.object[error.start]:02x} at byte offset {error.start} of a text of this row"
        return RecordError(f"{byte}; expected UTF-8.")
    except (ValueError, OverflowError) as error:  # Python has no date so late, for example
        return RecordError(f"found a value that cannot be read ({error}); mend it or leave its column out.")


FORMATS: dict[tuple[str, ...], Callable[[Path], Rows]] = {
    (".jsonl", ".jsonl.gz", ".json", ".json.gz"): _json_rows,
    (".parquet",): _parquet_rows,
    (".tsv", ".tsv.gz"): _triple_rows,
}
SUFFIXES = tuple(suffix for suffixes in FORMATS for suffix in suffixes)


# ---- sources: a file, or a data set of the hub


def is_file_name(name: str) -> bool:
    """Whether a name is written as a file, there or not, rather than as a hub data set ("name" or "owner/name")."""
    has_suffix = name.lower().endswith(SUFFIXES + OTHER_FILE_SUFFIXES)
    return has_suffix or name.startswith((".", "~", "/")) or HUB_OPTIONS.split(name)[0].count("/") > 1


def is_file(source: str | Path) -> bool:
    """Whether the source is a file rather than a hub data set."""
    return isinstance(source, Path) or is_file_name(source) or Path(source).exists()


FILE_SUFFIXES = ", ".join(SUFFIXES)  # for help and messages
DATASET_HELP = (
    f"a file ({FILE_SUFFIXES}) or a data set of the hub (owner/name, with @revision and #configuration after it "
    "where they are needed)"
)
DatasetName = Annotated[str, Location(file=True, hub=True, is_file_name=is_file_name)]


def checked_path(source: str | Path) -> Path:
    """The path of an existing file with a known suffix, else DataError."""
    path = Path(source).expanduser()
    expected = f"expected a file that ends in {FILE_SUFFIXES}"
    if path.is_dir():
        raise DataError(f"{source}: found a folder; {expected}.")
    if not path.exists():
        raise DataError(f"{source}: no such file; check the path (the current folder is {Path.cwd()}).")
    if not path.is_file():  # a pipe can be read only once, a device has no end
        raise DataError(f"{source}: found a pipe or a device; {expected}.")
    if not path.name.lower().endswith(SUFFIXES):
        raise DataError(f"{source}: found the suffix {path.suffix!r}; {expected}.")
    return path


def load_hub_dataset(name: str, split: str):
    """A data set of the hub. name: "owner/name", with "@revision" and "#configuration" after it where they are needed.

    Raises DataError where neither the hub nor the cache has it.
    """
    import datasets

    path, _, configuration = name.partition("#")
    path, _, revision = path.partition("@")
    given = {option: value for option, value in (("name", configuration), ("revision", revision)) if value}
    try:
        return datasets.load_dataset(path, split=split, **given)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name}[{split}]: no file of this name, and the hub data set could not be loaded ({reason}); check the "
            "path, or the name (owner/name@revision#configuration), split and connection."
        ) from error


def source_name(source: str | Path, split: str) -> str:
    """What messages call a source."""
    return str(source) if is_file(source) else f"{source}[{split}]"


def read_records(source: str | Path, rules: RecordRules, *, split: str = "train") -> Iterator[Record]:
    """Yield every valid record of a file or hub data set, in order, with one small batch in memory at a time.

    split: of a hub data set; files have none. Raises DataError after the last line with all bad lines, so
    a caller that stores records must discard them then; also when the source cannot be opened or has no records. Blank
    lines are skipped but counted.
    """
    name, bad, is_empty = source_name(source, split), BadLines(), True
    try:
        for line, row in _rows(source, split):
            is_empty = False
            try:
                if isinstance(row, RecordError):
                    raise row
                record = parse_record(row, line, rules)
            except RecordError as error:
                bad.add(f"{name}:{line}: {error}")
            else:
                yield record
    except _SourceError as error:
        bad.add(_placed(name, error), last=True)
    bad.raise_any()
    if is_empty:
        raise DataError(f"{name}: found no records; expected one record per line (or row).")


def _placed(name: str | Path, error: _SourceError) -> str:
    return f"{name}: {error.message}" if error.line is None else f"{name}:{error.line}: {error.message}"


def _rows(source: str | Path, split: str) -> Rows:
    if not is_file(source):
        return enumerate(load_hub_dataset(str(source), split), 1)
    path = checked_path(source)
    return next(read for suffixes, read in FORMATS.items() if path.name.lower().endswith(suffixes))(path)


# ---- files that are read to the first bad line


def row_objects(path: Path, on_bytes: Callable[[int], object] = lambda count: None) -> Iterator[tuple[int, dict]]:
    """(line, object) of every line of JSON that is not blank, or (row, object) of a Parquet file. Raises DataError at
    the first bad one. on_bytes: see `byte_lines`."""
    try:
        is_parquet = path.name.lower().endswith(".parquet")
        for line, entry in _parquet_rows(path) if is_parquet else _json_rows(path, on_bytes):
            if not isinstance(entry, dict):
                fault = entry if isinstance(entry, RecordError) else "found JSON that is no object; expected an object."
                raise DataError(f"{path}:{line}: {fault}")
            yield line, entry
    except _SourceError as error:
        raise DataError(_placed(path, error)) from None


def text_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line, its text) of every line that is not blank. Raises DataError at the first bad line."""
    try:
        for line, raw in byte_lines(path):
            if raw.strip():
                yield line, decoded(raw)
    except RecordError as error:
        raise DataError(f"{path}:{line}: {error}") from None
    except _SourceError as error:
        raise DataError(_placed(path, error)) from None


def entry_text(entry: dict, key: str, place: str) -> str:
    """The string under `key`; DataError where it is missing, no string, or half of a character pair."""
    try:
        return text_of(entry, key)
    except RecordError as error:
        raise DataError(f"{place}: {error}") from None
