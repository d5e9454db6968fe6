"""Writing a store from records: plain files first, one per column, then Arrow over them.

The columns are mapped, not loaded, so that memory does not grow with the source. `store` says what a
store is and keeps the finished ones.

The trap: the order of the steps in `build_store`. With group_by_query, a row of a `group.*` column is a run
of adjacent pairs until `_merge_runs`, and a pair is marked positive by itself until `_mark_positives`. The
hashes serve for counting alone: they are not reordered with their rows, and counting sorts them in place.
"""

import hashlib
import json
import shutil
import struct
from array import array
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

import numpy as np
import pyarrow as pa

from rag_retrieval.data.records import ONE_POSITIVE_EXPECTED, BadLines, Record, describe_labels
from rag_retrieval.data.summary import StoreSummary, label_histogram

STORE_FILES = ("groups.arrow", "pairs.arrow")
FORMAT_VERSION = 2  # raise it whenever the same source would give another store
CHUNK = 1 << 13  # groups or pairs handled at once

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
    "pair.teacher": "f4",  # NaN: absent. Only where teacher scores are read
}
_pack_int64 = struct.Struct("=q").pack


def build_store(
    folder: Path,
    records: Iterable[Record],
    name: str,
    group_by_query: bool,
    exactly_one_positive: bool,
    with_teacher: bool,
) -> None:
    """Write the store of `records` into the new folder; after an error, the caller removes what is there.

    name: the source, for error messages. with_teacher: the records have teacher scores, which are kept.
    Raises DataError where groups made by group_by_query must have exactly one positive and do not. The records
    must not be none: reading them raises that.
    """
    raw = folder / "raw"
    raw.mkdir(parents=True)
    counts = _write_raw(raw, records, group_by_query, with_teacher)
    if group_by_query:
        _merge_runs(raw)
        _mark_positives(raw)
        if exactly_one_positive:
            _demand_one_positive(raw, name)
    _write_store(folder, raw)
    counted = asdict(_summarise(raw, **counts))
    shutil.rmtree(raw)
    sizes = {file: (folder / file).stat().st_size for file in STORE_FILES}
    (folder / "meta.json").write_text(json.dumps({"bytes": sizes, "summary": counted}))


def _column(raw: Path, name: str, mode: str = "r") -> np.ndarray:
    path = raw / name
    if path.stat().st_size == 0:  # an empty file cannot be mapped
        return np.empty(0, COLUMNS[name])
    return np.asarray(np.memmap(path, COLUMNS[name], mode))  # a plain array: slicing a memmap is slow


def _write_raw(raw: Path, records: Iterable[Record], group_by_query: bool, with_teacher: bool) -> dict[str, int]:
    """Stream records into columns. With group_by_query a group is a run of adjacent pairs of one query."""
    counts = {"records": 0, "empty_documents": 0}
    # group.first and pair.group follow from the sizes at the end
    others = {"group.first", "pair.group"} | (set() if with_teacher else {"pair.teacher"})
    with ExitStack() as stack:
        files = {name: stack.enter_context(open(raw / name, "wb")) for name in COLUMNS if name not in others}
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
        if record.teacher_scores is not None:
            self.write["pair.teacher"](array("f", record.teacher_scores).tobytes())
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
    columns = ["pair.label", "pair.positive", "pair.line", *_teacher_columns(raw)]
    _reorder(raw, "document", columns, starts[order], sizes[order])
    _reorder(raw, "query", ["group.line", "group.pointwise"], leaders, np.ones_like(leaders))
    merged = np.zeros(len(leaders), np.int64)
    np.add.at(merged, numbers, sizes)
    merged.tofile(raw / "group.size.new")
    (raw / "group.size.new").rename(raw / "group.size")


def _teacher_columns(raw: Path) -> list[str]:
    """The column of teacher scores where there is one."""
    return ["pair.teacher"] if (raw / "pair.teacher").exists() else []


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
    problems = BadLines()
    for groups, pairs, sizes, first in _group_chunks(raw):
        label = labels[pairs]
        ones = np.add.reduceat(label == 1, first, dtype=int)
        zeros = np.add.reduceat(label == 0, first, dtype=int)
        bad = np.flatnonzero(pointwise[groups] & ((ones != 1) | (zeros != sizes - 1)))
        for group in bad.tolist():
            values = label[first[group] : first[group] + sizes[group]].tolist()
            found = f"the pairs of this query have the labels {describe_labels(values)}"
            problems.add(f"{name}:{lines[groups][group]}: {found}; {ONE_POSITIVE_EXPECTED}")
    problems.raise_any()


def _write_store(folder: Path, raw: Path) -> None:
    with open(raw / "group.first", "wb") as first_file, open(raw / "pair.group", "wb") as group_file:
        for groups, pairs, sizes, first in _group_chunks(raw):
            (pairs.start + first).tofile(first_file)
            np.repeat(np.arange(groups.start, groups.stop, dtype=np.int32), sizes).tofile(group_file)
    columns = {"query": _text_array(raw, "query")}
    columns |= {name: _number_array(raw, f"group.{name}") for name in ("first", "size", "line")}
    _write_arrow(folder / "groups.arrow", columns)
    columns = {"document": _text_array(raw, "document")}
    numbers = ["pair.group", "pair.label", "pair.line", "pair.positive", *_teacher_columns(raw)]
    columns |= {name.removeprefix("pair."): _number_array(raw, name) for name in numbers}
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
        label_histogram=label_histogram(labels),
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
