"""Files and hub datasets as streams of ranking records, with all bad lines of a source in one error.

A source is a JSON-lines file, plain or gzipped, a Parquet file, or a dataset of the Hugging Face hub.

The trap: `read_records` yields the good records as it goes and raises the bad lines only at the end, all
together. Whoever stores records must throw the work away when `DataError` comes.
"""

import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rag_retrieval.data.records import DataError, Record, RecordError, RecordRules, parse_record

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".json.gz", ".parquet")
OTHER_FILE_SUFFIXES = (".csv", ".tsv", ".txt", ".gz", ".zip", ".arrow")
MAX_SHOWN = 20  # bad lines that an error shows; the rest is counted


class _SourceError(Exception):
    """A fault that ends the reading of a source at a line (None: before any line)."""

    def __init__(self, line: int | None, message: str):
        self.line, self.message = line, message


def read_records(source: str | Path, rules: RecordRules, *, split: str = "train") -> Iterator[Record]:
    """Yield every valid record of a file or hub dataset, in order, with one small batch in memory at a time.

    split: of a hub dataset; files have none. Raises DataError after the last line with all bad lines, and
    also when the source cannot be opened or has no records. Blank lines are skipped but counted.
    """
    name = str(source) if is_file(source) else f"{source}[{split}]"
    problems, num_bad, num_good = [], 0, 0
    try:
        for line, data in _rows(source, split):
            try:
                if isinstance(data, RecordError):
                    raise data
                record = parse_record(data, line, rules)
            except RecordError as error:
                num_bad += 1
                if num_bad <= MAX_SHOWN:
                    problems.append(f"{name}:{line}: {error}")
            else:
                num_good += 1
                yield record
    except _SourceError as error:
        where = name if error.line is None else f"{name}:{error.line}"
        # Reading ended here, so this line is always shown, whatever came before it.
        problems, num_bad = [*problems[: MAX_SHOWN - 1], f"{where}: {error.message}"], num_bad + 1
    if num_bad:
        raise bad_lines_error(problems, num_bad)
    if not num_good:
        raise DataError(f"{name}: found no records; expected one record per line (or row).")


def bad_lines_error(problems: list[str], count: int) -> DataError:
    """One error for `count` bad lines, of which `problems` holds at least the first `MAX_SHOWN`."""
    shown = problems[:MAX_SHOWN]
    if count > len(shown):
        more = count - len(shown)
        shown = [*shown, f"... and {more} more bad line{'s' if more > 1 else ''}"]
    return DataError("\n".join(shown))


def is_file(source: str | Path) -> bool:
    """Whether the source names a file rather than a hub dataset ("name" or "owner/name")."""
    path = Path(source)
    looks_like_file = str(source).lower().endswith(SUFFIXES + OTHER_FILE_SUFFIXES)
    is_no_hub_name = str(source).startswith((".", "~", "/")) or len(path.parts) > 2
    return isinstance(source, Path) or looks_like_file or is_no_hub_name or path.exists()


def checked_path(source: str | Path) -> Path:
    """The path of an existing file with a known suffix, else DataError."""
    path = Path(source).expanduser()
    expected = f"expected a file that ends in {', '.join(SUFFIXES)}"
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
    """`datasets.load_dataset(name, split=split)`, with DataError where neither hub nor cache has it."""
    import datasets

    try:
        return datasets.load_dataset(name, split=split)
    except (OSError, ValueError, RuntimeError, datasets.exceptions.DatasetsError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise DataError(
            f"{name}[{split}]: no file of this name, and the hub dataset could not be loaded ({reason}); "
            "check the path, or the name, split and connection."
        ) from error


def _rows(source: str | Path, split: str) -> Iterator[tuple[int, object]]:
    if not is_file(source):
        return enumerate(load_hub_dataset(str(source), split), 1)
    path = checked_path(source)
    return _parquet_rows(path) if path.suffix.lower() == ".parquet" else _json_rows(path)


def _json_rows(path: Path) -> Iterator[tuple[int, object]]:
    """(line, decoded JSON or RecordError); _SourceError where no further line can be read."""
    line, offset = 0, 0
    try:
        with gzip.open(path) if path.suffix.lower() == ".gz" else path.open("rb") as stream:
            _refuse_other_layouts(stream.peek(256))
            # Not text mode: that would end lines at a lone \r too, and lose the place of a wrong byte.
            for line, raw in enumerate(stream, 1):
                if raw.strip(b"\xef\xbb\xbf \t\r\n" if line == 1 else None):
                    yield line, _decode_json(raw, line, offset)
                offset += len(raw)
    except EOFError:
        raise _SourceError(line + 1, "the gzip data ends too early; copy the whole file again.") from None
    except (gzip.BadGzipFile, zlib.error) as error:
        raise _SourceError(line + 1, f"found broken gzip data ({error}); expected a gzip file.") from None
    except OSError as error:
        raise _SourceError(None, f"the file cannot be read ({error.strerror}).") from None


def _refuse_other_layouts(head: bytes) -> None:
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise _SourceError(1, "found a UTF-16 mark at byte offset 0; expected UTF-8: save the file as UTF-8.")
    if head.startswith(b"\x1f\x8b"):
        raise _SourceError(1, "found gzip data; expected plain text: let the file's name end in .gz.")
    if head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
        raise _SourceError(1, "found a JSON list; expected one record per line: convert it (jq -c '.[]').")


def _decode_json(raw: bytes, line: int, offset: int) -> object:
    try:
        return json.loads(raw.decode("utf-8-sig" if line == 1 else "utf-8").rstrip("\r\n"))
    except UnicodeDecodeError as error:
        # error.object: the bytes that error.start counts in, without the UTF-8 mark.
        at = offset + len(raw) - len(error.object) + error.start
        return RecordError(_wrong_byte(error, at, "the text"))
    except json.JSONDecodeError as error:
        where = f"at column {error.colno} ({error.msg})"
        return RecordError(f"found broken JSON {where}; expected one whole object per line.")
    except (ValueError, RecursionError) as error:  # a number of thousands of digits, or deep nesting
        return RecordError(f"found JSON that cannot be read ({error}); expected one record.")


def _parquet_rows(path: Path) -> Iterator[tuple[int, object]]:
    row = 0
    try:
        with pq.ParquetFile(path, memory_map=True) as file:
            for batch in file.iter_batches(batch_size=1024):
                for data in _batch_rows(batch):
                    row += 1
                    yield row, data
    except (OSError, pa.ArrowException) as error:
        reason = " ".join(str(error).split())
        raise _SourceError(row + 1, f"found broken Parquet data ({reason}); expected a whole file.") from None


def _batch_rows(batch: pa.RecordBatch) -> list:
    try:
        return batch.to_pylist()
    except (ValueError, OverflowError):  # find the rows that are at fault
        return [_batch_row(batch, index) for index in range(batch.num_rows)]


def _batch_row(batch: pa.RecordBatch, index: int) -> object:
    try:
        return batch.slice(index, 1).to_pylist()[0]
    except UnicodeDecodeError as error:
        return RecordError(_wrong_byte(error, error.start, "a text of this row"))
    except (ValueError, OverflowError) as error:  # Python has no date so late, for example
        return RecordError(f"found a value that cannot be read ({error}); mend it or leave its column out.")


def _wrong_byte(error: UnicodeDecodeError, offset: int, of: str) -> str:
    byte = error.object[error.start]
    return f"found the byte 0x{byte:02x} at byte offset {offset} of {of}; expected UTF-8."
