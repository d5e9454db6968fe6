"""A memory-mapped store of ranking records: built once, cached, shared by all processes that read it.

A store is a folder with two Arrow files of one record batch each, so that every column is one contiguous
stretch of the file and is read in place: `groups.arrow` (query, first, size, line) and `pairs.arrow`
(document, group, label, line, positive), a group's pairs side by side. `meta.json` holds sizes and summary.

The trap: a pointwise file has one group per record unless it is opened with `group_by_query=True`; then pairs
of the same query form one group wherever they stand, and pair order is no longer file order.
"""

import hashlib
import json
import os
import shutil
import struct
import uuid
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pyarrow as pa
from filelock import FileLock

from rag_retrieval.records import (
    MAX_SHOWN,
    ONE_POSITIVE_EXPECTED,
    DataError,
    Record,
    RecordRules,
    bad_lines_error,
    checked_path,
    describe_labels,
    is_file,
    load_hub_dataset,
    read_records,
)

STORE_FILES = ("groups.arrow", "pairs.arrow")
FORMAT_VERSION = 1  # raise it whenever the same source would give another store
CHUNK = 1 << 13  # groups or pairs handled at once while building
SAMPLE = 1 << 20  # bytes at each end of a source file that enter its cache key
MAX_LEVELS = 11  # the scale 0 to 10 is drawn level by level, more distinct labels as ten bins


class Pair(NamedTuple):
    query: str
    document: str
    label: float
    line: int


class Group(NamedTuple):
    """labels: float32, positives: bool, both [documents] and read-only. line: that of the first pair."""

    query: str
    documents: list[str]
    labels: np.ndarray
    positives: np.ndarray
    line: int


class RecordStore:
    """Random access to a store's folder. Pickles as the path alone; processes map the files on first use."""

    def __init__(self, folder: str | Path):
        self.folder = Path(folder)

    def __getstate__(self) -> dict:
        return {"folder": self.folder}

    @property
    def num_pairs(self) -> int:
        return len(self.labels)

    @property
    def num_groups(self) -> int:
        return len(self.group_offsets)

    def pair(self, index: int) -> Pair:
        """The pair 0 <= index < num_pairs; IndexError outside (negative numbers too)."""
        view = self._view
        if not 0 <= index < view.num_pairs:
            raise IndexError(f"pair {index} of a store with {view.num_pairs} pairs")
        query = view.query[view.pair_group[index]]
        return Pair(query, view.document[index], view.label[index], view.pair_line[index])

    def group(self, index: int) -> Group:
        """The group 0 <= index < num_groups; IndexError outside (negative numbers too)."""
        view = self._view
        if not 0 <= index < view.num_groups:
            raise IndexError(f"group {index} of a store with {view.num_groups} groups")
        start = view.first[index]
        stop = start + view.size[index]
        documents = [view.document[pair] for pair in range(start, stop)]
        labels, positives = self.labels[start:stop], self.positives[start:stop]
        return Group(view.query[index], documents, labels, positives, view.group_line[index])

    @cached_property
    def labels(self) -> np.ndarray:
        """float32 [pairs], read-only view of the file."""
        return _numbers(self._pairs, "label")

    @cached_property
    def positives(self) -> np.ndarray:
        """bool [pairs], read-only view of the file."""
        return _numbers(self._pairs, "positive").view(bool)

    @cached_property
    def group_offsets(self) -> np.ndarray:
        """int64 [groups]: the first pair of each group, ascending; read-only view of the file."""
        return _numbers(self._groups, "first")

    @cached_property
    def group_sizes(self) -> np.ndarray:
        """int64 [groups]: the number of documents of each group, at least 1; read-only view of the file."""
        return _numbers(self._groups, "size")

    @cached_property
    def meta(self) -> dict:
        return json.loads((self.folder / "meta.json").read_text())

    @cached_property
    def _groups(self) -> pa.RecordBatch:
        return _read_arrow(self.folder / "groups.arrow")

    @cached_property
    def _pairs(self) -> pa.RecordBatch:
        return _read_arrow(self.folder / "pairs.arrow")

    @cached_property
    def _view(self) -> "_View":
        return _View(self._groups, self._pairs)


class _View:
    """The columns as memoryviews: one element costs a third of numpy's and a tenth of pyarrow's access."""

    def __init__(self, groups: pa.RecordBatch, pairs: pa.RecordBatch):
        self.num_groups, self.num_pairs = groups.num_rows, pairs.num_rows
        self.query, self.document = _Texts(groups["query"]), _Texts(pairs["document"])
        self.first, self.size, self.group_line = (
            memoryview(_numbers(groups, name)) for name in ("first", "size", "line")
        )
        self.pair_group, self.label, self.pair_line = (
            memoryview(_numbers(pairs, name)) for name in ("group", "label", "line")
        )


class _Texts:
    """A large_string column, decoded text by text."""

    def __init__(self, column: pa.LargeStringArray):
        _, offsets, text = column.buffers()
        self.offsets = memoryview(np.frombuffer(offsets, np.int64, len(column) + 1))
        self.text = memoryview(text if text is not None else b"")

    def __getitem__(self, index: int) -> str:
        return str(self.text[self.offsets[index] : self.offsets[index + 1]], "utf-8")


def _numbers(batch: pa.RecordBatch, name: str) -> np.ndarray:
    """A number column in place. Not `to_numpy`, which imports pandas: 30 MiB and half a second a process."""
    column = batch[name]
    return np.frombuffer(column.buffers()[1], column.type.to_pandas_dtype(), len(column))


def _read_arrow(path: Path) -> pa.RecordBatch:
    with pa.memory_map(str(path)) as source:  # the batch keeps the mapping alive
        return pa.ipc.open_file(source).get_batch(0)


# ---- the cache ------------------------------------------------------------------------------------------


def open_store(
    source: str | Path,
    *,
    split: str = "train",
    label_key: str = "label",
    min_label: float | None = None,
    max_label: float | None = None,
    group_by_query: bool = False,
    exactly_one_positive: bool = False,
    cache_dir: Path | None = None,
) -> RecordStore:
    """The store of a file or hub dataset, built unless the cache has it; DataError with all bad lines.

    group_by_query: pointwise pairs of one query become one group, in the order of first appearance, and their
        positives are those of a hits record. Other records keep their own group.
    exactly_one_positive: hits records, and groups made by group_by_query, have one label 1 and the rest 0.
    cache_dir: default $RAG_RETRIEVAL_CACHE, else ~/.cache/rag_retrieval. Nothing is ever deleted from it but
        damaged stores. The key holds the file's path, size, time and the content of its first and last MiB.

    Building needs about three times the source's size on disk for a while. Its memory does not grow with the
    source, but for group_by_query: about 50 bytes for each run of adjacent pairs of one query.
    """
    rules = RecordRules(label_key, min_label, max_label, exactly_one_positive)
    settings = [FORMAT_VERSION, asdict(rules), group_by_query]
    cache_dir = Path(cache_dir) if cache_dir else _default_cache_dir()
    cache_dir.mkdir(parents=True, exist_ok=True)
    identity = _identity(source, split)
    key = hashlib.sha256(json.dumps([settings, identity]).encode()).hexdigest()[:32]
    folder = cache_dir / key
    # All processes of a run come here at once; the first builds and the others find the result.
    with FileLock(f"{folder}.lock"):
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            _build_aside(folder, source, split, rules, group_by_query)
            if _identity(source, split) != identity:
                shutil.rmtree(folder)
                raise DataError(f"{source}: the source changed while it was read; start again.")
    return RecordStore(folder)


def _default_cache_dir() -> Path:
    return Path(os.environ.get("RAG_RETRIEVAL_CACHE") or "~/.cache/rag_retrieval").expanduser()


def _identity(source: str | Path, split: str) -> list:
    if not is_file(source):
        # The one thing that names the content of a loaded dataset, whatever revision the hub gave.
        return [str(source), split, load_hub_dataset(str(source), split)._fingerprint]
    path = checked_path(source)
    status = path.stat()
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(SAMPLE))
        file.seek(max(0, status.st_size - SAMPLE))
        digest.update(file.read(SAMPLE))
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, digest.hexdigest()]


def _is_whole(folder: Path) -> bool:
    """Whether all files have the recorded sizes and open as Arrow; a flipped bit inside is not noticed."""
    store = RecordStore(folder)
    try:
        sizes = {name: (folder / name).stat().st_size for name in STORE_FILES}
        counts = store.meta["summary"]["groups"], store.meta["summary"]["pairs"]
        return sizes == store.meta["bytes"] and counts == (store.num_groups, store.num_pairs)
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException):
        return False


def _build_aside(
    folder: Path, source: str | Path, split: str, rules: RecordRules, group_by_query: bool
) -> None:
    """Build under a temporary name, then rename: a folder under its own name is always complete."""
    name = str(source) if is_file(source) else f"{source}[{split}]"
    aside = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex[:8]}")
    raw = aside / "raw"
    try:
        raw.mkdir(parents=True)
        counts = _write_raw(raw, read_records(source, rules, split=split), group_by_query)
        if group_by_query:
            _merge_runs(raw)
            _mark_positives(raw)
            if rules.exactly_one_positive:
                _demand_one_positive(raw, name)
        _write_store(aside, raw)
        counted = asdict(_summarise(raw, **counts))
        shutil.rmtree(raw)
        sizes = {name: (aside / name).stat().st_size for name in STORE_FILES}
        (aside / "meta.json").write_text(json.dumps({"bytes": sizes, "summary": counted}))
        aside.rename(folder)
    finally:
        shutil.rmtree(aside, ignore_errors=True)


# ---- building: plain files, one per column, then Arrow over them ------------------------------------------

COLUMNS = {
    "query.text": "u1",  # UTF-8, end to end
    "query.offsets": "i8",  # [groups + 1] into query.text
    "query.hash": "u8",
    "group.size": "i8",
    "group.line": "i8",
    "group.key": "V16",  # 16-byte hash of the query
    "group.pointwise": "?",
    "group.first": "i8",
    "document.text": "u1",
    "document.offsets": "i8",  # [pairs + 1] into document.text
    "pair.label": "f4",
    "pair.positive": "?",
    "pair.line": "i8",
    "pair.group": "i4",
    "pair.hash": "u8",  # of query and document
}
_pack_int64 = struct.Struct("=q").pack


def _column(raw: Path, name: str, mode: str = "r") -> np.ndarray:
    path = raw / name
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, COLUMNS[name])
    return np.asarray(np.memmap(path, COLUMNS[name], mode))  # a plain array: slicing a memmap is slow


def _write_raw(raw: Path, records: Iterable[Record], group_by_query: bool) -> dict[str, int]:
    """Stream records into columns. With group_by_query a group is a run of adjacent pairs of one query."""
    counts = {"records": 0, "empty_documents": 0}
    with ExitStack() as stack:
        # group.first and pair.group follow from the sizes at the end
        files = {
            name: stack.enter_context(open(raw / name, "wb"))
            for name in COLUMNS
            if name not in ("group.first", "pair.group")
        }
        writer = _RawWriter(files, group_by_query)
        for record in records:
            writer.add(record)
            counts["records"] += 1
            counts["empty_documents"] += sum(not document.strip() for document in record.documents)
        writer.end_group()
    return counts


class _RawWriter:
    """Appends records to open column files; holds one group's key and size, and the files' write buffers."""

    def __init__(self, files: dict, group_by_query: bool):
        self.write = {name: file.write for name, file in files.items()}
        self.group_by_query = group_by_query
        self.key, self.size = None, 0
        self.query_end = self.document_end = 0
        self.write["query.offsets"](_pack_int64(0))
        self.write["document.offsets"](_pack_int64(0))

    def add(self, record: Record) -> None:
        query = record.query.encode()
        digest = hashlib.blake2b(query, digest_size=16).digest()
        key = digest if self.group_by_query and record.format == "pointwise" else None
        if key is None or key != self.key:
            self.end_group()
            self._begin_group(record, query, digest)
        self.key = key
        for document in record.documents:
            self._add_document(document.encode(), digest)
        count = len(record.documents)
        self.write["pair.label"](array("f", record.labels).tobytes())
        self.write["pair.positive"](bytes(record.positive))
        self.write["pair.line"](_pack_int64(record.line) * count)
        self.size += count

    def end_group(self) -> None:
        if self.size:
            self.write["group.size"](_pack_int64(self.size))
        self.size = 0

    def _begin_group(self, record: Record, query: bytes, digest: bytes) -> None:
        self.query_end += len(query)
        self.write["query.text"](query)
        self.write["query.offsets"](_pack_int64(self.query_end))
        self.write["query.hash"](digest[:8])
        self.write["group.key"](digest)
        self.write["group.line"](_pack_int64(record.line))
        self.write["group.pointwise"](bytes([record.format == "pointwise"]))

    def _add_document(self, document: bytes, query_digest: bytes) -> None:
        self.document_end += len(document)
        self.write["document.text"](document)
        self.write["document.offsets"](_pack_int64(self.document_end))
        self.write["pair.hash"](hashlib.blake2b(query_digest + document, digest_size=8).digest())


def _merge_runs(raw: Path) -> None:
    """Bring runs of the same query together, in order of first runs; does nothing where each has one run."""
    numbers, leaders = _number_runs(raw)
    if len(leaders) == len(numbers):
        return
    order = np.argsort(numbers, kind="stable")  # stable: file order within a query
    sizes = _column(raw, "group.size")
    starts = np.cumsum(sizes) - sizes
    _reorder(raw, "document", ["pair.label", "pair.positive", "pair.line"], starts[order], sizes[order])
    _reorder(raw, "query", ["group.line", "group.pointwise"], leaders, np.ones_like(leaders))
    merged = np.zeros(len(leaders), np.int64)
    np.add.at(merged, numbers, sizes)
    merged.tofile(raw / "group.size.new")
    (raw / "group.size.new").rename(raw / "group.size")


def _number_runs(raw: Path) -> tuple[np.ndarray, np.ndarray]:
    """(group of each run, first run of each group); groups numbered by first appearance.

    Compares 16-byte hashes by sorting: a dict of queries would hold 200 bytes for each.
    """
    keys = _column(raw, "group.key").view("u8").reshape(-1, 2).copy()
    alone = np.flatnonzero(~_column(raw, "group.pointwise"))
    keys[alone, 0], keys[alone, 1] = alone, 0
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: the first of equal keys is the first run
    keys = keys[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (keys[1:] != keys[:-1]).any(axis=1)
    first_run = np.empty_like(order)
    first_run[order] = order[is_new][np.cumsum(is_new) - 1]
    is_leader = first_run == np.arange(len(order))
    return (np.cumsum(is_leader) - 1)[first_run], np.flatnonzero(is_leader)


def _reorder(raw: Path, texts: str, columns: list[str], starts: np.ndarray, sizes: np.ndarray) -> None:
    """Rewrite the rows of a text column and of its companions as the given stretches, one after the other."""
    with ExitStack() as stack:
        names = [f"{texts}.text", f"{texts}.offsets", *columns]
        out = {name: stack.enter_context(open(raw / f"{name}.new", "wb")) for name in names}
        text, offsets = _column(raw, f"{texts}.text"), _column(raw, f"{texts}.offsets")
        values = {name: _column(raw, name) for name in columns}
        end = 0
        out[f"{texts}.offsets"].write(_pack_int64(0))
        for rows in _row_chunks(starts, sizes):
            lengths = offsets[rows + 1] - offsets[rows]
            (end + np.cumsum(lengths)).tofile(out[f"{texts}.offsets"])
            end += int(lengths.sum())
            for row in rows.tolist():
                out[f"{texts}.text"].write(text[offsets[row] : offsets[row + 1]])
            for name in columns:
                values[name][rows].tofile(out[name])
    for name in names:
        (raw / f"{name}.new").rename(raw / name)


def _row_chunks(starts: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """The row numbers start..start + size - 1 of each stretch, some thousand stretches at a time."""
    for begin in range(0, len(starts), CHUNK):
        size = sizes[begin : begin + CHUNK]
        shift = starts[begin : begin + CHUNK] - (np.cumsum(size) - size)
        yield np.repeat(shift, size) + np.arange(size.sum())


def _group_chunks(raw: Path) -> Iterator[tuple[slice, slice, np.ndarray, np.ndarray]]:
    """(groups, their pairs, their sizes, their first pairs counted from the chunk's first pair)."""
    sizes = _column(raw, "group.size")
    pair = 0
    for begin in range(0, len(sizes), CHUNK):
        size = np.array(sizes[begin : begin + CHUNK])
        stop = pair + int(size.sum())
        yield slice(begin, begin + len(size)), slice(pair, stop), size, np.cumsum(size) - size
        pair = stop


def _mark_positives(raw: Path) -> None:
    """`records.positives` for whole groups of pointwise pairs, which were marked one by one."""
    labels, pointwise = _column(raw, "pair.label"), _column(raw, "group.pointwise")
    positive = _column(raw, "pair.positive", "r+")
    for groups, pairs, sizes, first in _group_chunks(raw):
        label = labels[pairs]
        low, high = np.minimum.reduceat(label, first), np.maximum.reduceat(label, first)
        threshold = np.repeat(np.where(high > low, low, 0), sizes)
        of_pointwise = np.repeat(pointwise[groups], sizes)
        positive[pairs] = np.where(of_pointwise, label > threshold, positive[pairs])


def _demand_one_positive(raw: Path, name: str) -> None:
    """DataError naming the first line of each pointwise group without exactly one 1 and the rest 0."""
    labels, lines = _column(raw, "pair.label"), _column(raw, "group.line")
    pointwise = _column(raw, "group.pointwise")
    problems, count = [], 0
    for groups, pairs, sizes, first in _group_chunks(raw):
        label = labels[pairs]
        ones = np.add.reduceat(label == 1, first, dtype=int)
        zeros = np.add.reduceat(label == 0, first, dtype=int)
        bad = np.flatnonzero(pointwise[groups] & ((ones != 1) | (zeros != sizes - 1)))
        count += len(bad)
        for group in bad[: MAX_SHOWN - len(problems)].tolist():
            values = label[first[group] : first[group] + sizes[group]].tolist()
            found = f"the pairs of this query have the labels {describe_labels(values)}"
            problems.append(f"{name}:{lines[groups][group]}: {found}; {ONE_POSITIVE_EXPECTED}")
    if count:
        raise bad_lines_error(problems, count)


def _write_store(folder: Path, raw: Path) -> None:
    with open(raw / "group.first", "wb") as first_file, open(raw / "pair.group", "wb") as group_file:
        for groups, pairs, sizes, first in _group_chunks(raw):
            (pairs.start + first).tofile(first_file)
            np.repeat(np.arange(groups.start, groups.stop, dtype=np.int32), sizes).tofile(group_file)
    columns = {"query": _text_array(raw, "query")}
    columns |= {name: _number_array(raw, f"group.{name}") for name in ("first", "size", "line")}
    _write_arrow(folder / "groups.arrow", columns)
    columns = {"document": _text_array(raw, "document")}
    columns |= {name: _number_array(raw, f"pair.{name}") for name in ("group", "label", "line", "positive")}
    _write_arrow(folder / "pairs.arrow", columns)


def _text_array(raw: Path, name: str) -> pa.LargeStringArray:
    offsets, text = _column(raw, f"{name}.offsets"), _column(raw, f"{name}.text")
    buffers = [None, pa.py_buffer(offsets), pa.py_buffer(text)]
    return pa.Array.from_buffers(pa.large_string(), len(offsets) - 1, buffers)


def _number_array(raw: Path, name: str) -> pa.Array:
    values = _column(raw, name)
    if values.dtype == bool:
        values = values.view(np.uint8)  # Arrow's own bool is one bit, which numpy cannot view
    return pa.Array.from_buffers(pa.from_numpy_dtype(values.dtype), len(values), [None, pa.py_buffer(values)])


def _write_arrow(path: Path, columns: dict[str, pa.Array]) -> None:
    """One record batch, written straight from the mapped columns: no copy of them in memory."""
    batch = pa.RecordBatch.from_arrays(list(columns.values()), names=list(columns))
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


# ---- the summary ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StoreSummary:
    """Counts of a store. records: lines or rows of the source; queries: distinct ones.

    repeated_pairs: pairs whose query and document appeared before. empty_documents: empty or only blanks.
    equal_label_groups: groups, single documents included, that teach a pairwise loss nothing.
    label_histogram: (lowest, highest, pairs) for each level (lowest == highest), or for each of ten bins.
    """

    records: int
    groups: int
    pairs: int
    queries: int
    repeated_pairs: int
    empty_documents: int
    equal_label_groups: int
    smallest_group: int
    largest_group: int
    label_histogram: list[tuple[float, float, int]]


def summary(store: RecordStore) -> StoreSummary:
    """The counts taken when the store was built."""
    found = store.meta["summary"]
    return StoreSummary(**found | {"label_histogram": [tuple(bar) for bar in found["label_histogram"]]})


def _summarise(raw: Path, records: int, empty_documents: int) -> StoreSummary:
    labels = _column(raw, "pair.label")
    sizes = _column(raw, "group.size")
    equal = 0
    for _, pairs, _, first in _group_chunks(raw):
        label = labels[pairs]
        equal += int((np.minimum.reduceat(label, first) == np.maximum.reduceat(label, first)).sum())
    return StoreSummary(
        records=records,
        groups=len(sizes),
        pairs=len(labels),
        queries=_count_distinct(raw, "query.hash"),
        repeated_pairs=len(labels) - _count_distinct(raw, "pair.hash"),
        empty_documents=empty_documents,
        equal_label_groups=equal,
        smallest_group=int(sizes.min()),
        largest_group=int(sizes.max()),
        label_histogram=_label_histogram(labels),
    )


def _count_distinct(raw: Path, name: str) -> int:
    """Distinct 64-bit hashes, sorted in the file's own pages. One collision is expected at six billion."""
    hashes = _column(raw, name, "r+")
    hashes.sort()
    distinct = 1
    for begin in range(0, len(hashes), CHUNK):
        part = hashes[begin : begin + CHUNK + 1]
        distinct += int((part[1:] != part[:-1]).sum())
    return distinct


def _label_histogram(labels: np.ndarray) -> list[tuple[float, float, int]]:
    chunks = [slice(begin, begin + CHUNK) for begin in range(0, len(labels), CHUNK)]
    levels = np.empty(0, np.float32)
    for chunk in chunks:
        levels = np.union1d(levels, labels[chunk])
        if len(levels) > MAX_LEVELS:
            break
    else:
        counts = sum((labels[chunk][:, None] == levels).sum(axis=0) for chunk in chunks)
        return [(float(level), float(level), int(count)) for level, count in zip(levels, counts, strict=True)]
    low, high = float(labels.min()), float(labels.max())
    edges = np.linspace(low, high, 11)
    counts = sum(np.histogram(labels[chunk].astype(float), edges)[0] for chunk in chunks)
    return [(float(a), float(b), int(n)) for a, b, n in zip(edges[:-1], edges[1:], counts, strict=True)]


def format_summary(
    found: StoreSummary,
    name: str,
    *,
    token_lengths: np.ndarray | None = None,
    max_len: int | None = None,
    sampled: bool = False,
) -> str:
    """The summary as text of at most 80 columns (but for a longer name), without a final newline.

    name: the first line, for example the path of the source.
    token_lengths: int [pairs], tokens of each pair before truncation; sampled: of a sample of the pairs.
    max_len: tokens; pairs longer than that are counted as truncated.
    """
    rows = [("records", f"{found.records:,}"), ("pairs", f"{found.pairs:,}")]
    rows.append(("queries", f"{found.queries:,} distinct"))
    if found.largest_group > 1:
        sizes = f"{found.smallest_group:,} to {found.largest_group:,} documents"
        rows.append(("groups", f"{found.groups:,} of {sizes}"))
        rows.append(("", f"{found.equal_label_groups:,} of them with all labels equal"))
    rows.append(("repeated pairs", f"{found.repeated_pairs:,} (same query and document)"))
    rows.append(("empty documents", f"{found.empty_documents:,}"))
    if token_lengths is not None and len(token_lengths):
        rows += _token_rows(np.asarray(token_lengths), max_len, sampled)
    lines = [name, *(f"  {title:<17}{value}" for title, value in rows), "  labels"]
    return "\n".join(lines + _bars(found.label_histogram))


def _token_rows(lengths: np.ndarray, max_len: int | None, sampled: bool) -> list[tuple[str, str]]:
    p50, p95, p99 = np.percentile(lengths, [50, 95, 99], method="higher").tolist()
    rows = [("tokens per pair", f"p50 {p50:,}, p95 {p95:,}, p99 {p99:,}, max {lengths.max():,}")]
    if max_len is not None:
        count = int((lengths > max_len).sum())
        rows.append(("truncated", f"{count:,} pairs ({count / len(lengths):.1%}) at {max_len:,} tokens"))
    if sampled:
        rows.append(("", f"(tokens counted on a sample of {len(lengths):,} pairs)"))
    return rows


def _bars(histogram: list[tuple[float, float, int]], width: int = 30) -> list[str]:
    """One line for each level or bin; a bar's length is its share of the largest, at least 1 if not empty."""
    total, largest = sum(count for *_, count in histogram), max(count for *_, count in histogram)
    lines = []
    for low, high, count in histogram:
        name = f"{low:.4g}" if low == high else f"{low:.3g} to {high:.3g}"
        bar = "█" * max(round(width * count / largest), count > 0)
        lines.append(f"  {name:>20}  {count:>12,}  {count / total:>6.1%}  {bar}".rstrip())
    return lines
