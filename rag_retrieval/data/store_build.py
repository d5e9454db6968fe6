"""Writing a store from records. `store` says what a store is and keeps the finished ones.

Records are written row by row; then groups of one query are brought together where that is asked for. Columns are
mapped, not loaded, so that memory does not grow with the source.
"""

import hashlib
import json
import os
import unicodedata
from collections.abc import Iterable, Iterator
from dataclasses import asdict
from pathlib import Path

import numpy as np

from rag_retrieval.data.columns import ColumnWriter, read_column
from rag_retrieval.data.records import ONE_POSITIVE_EXPECTED, BadLines, DataError, Record, RecordRules, describe_labels
from rag_retrieval.data.summary import StoreSummary, label_histogram
from rag_retrieval.data.teachers import average_teachers

FORMAT_VERSION = 4  # raise it whenever the same source would give another store
CHUNK = 1 << 13  # groups or pairs handled at once
KINDS = {"hits": 0, "pos_neg": 0, "text": 0, "pointwise": 1, "triple": 2}  # of records; 0: groups of their own
POINTWISE, TRIPLE = 1, 2

# The numbers of a store: array's character and numpy's dtype. Of each pair:
PAIR = {"label": "f", "positive": "B", "line": "q", "teacher": "f", "document_id": "Q"}
# Of each group: first (its first pair), size, query_id and query_text_id (without its prompt). Of each pair too: group.
DTYPES = {
    **{"label": "f4", "positive": "?", "line": "i8", "teacher": "f4", "document_id": "u8"},
    **{"first": "i8", "size": "i8", "query_id": "u8", "query_text_id": "u8", "group": "i4"},
}
# While building. Of each run of pairs, which becomes a group: kind, key (a hash of the query, two numbers), query_hash.
# Of each pair: pair_hash, of query and document. query_hash and pair_hash are sorted in place when they are counted.
BUILDING = {"kind": "B", "key": "Q", "query_hash": "Q", "pair_hash": "Q"}


def build_store(folder: Path, records: Iterable[Record], name: str, group_by_query: bool, rules: RecordRules) -> None:
    """Write the store of `records` into the new folder; after an error, the caller removes what is there.

    name: the source, for error messages. rules: by which the records were read.
    Raises DataError where groups made by group_by_query must have exactly one positive and do not. The records
    must not be none: reading them raises that.
    """
    folder.mkdir(parents=True)
    wanted = {"teacher": rules.teacher_key is not None, "document_id": rules.for_embedder}
    pair_columns = [column for column in PAIR if wanted.get(column, True)]
    counts = _write_records(folder, records, group_by_query, pair_columns)
    if group_by_query:
        _merge_runs(folder, pair_columns)
        _drop_repeated_documents(folder, pair_columns)
        _mark_positives(folder)
        if rules.exactly_one_positive:
            _require_one_positive(folder, name)
    _write_groups(folder)
    if isinstance(rules.teacher_key, tuple):
        _average_teachers(folder, name)
    summary = asdict(_summarise(folder, counts))
    for column in BUILDING:
        (folder / column).unlink()
    for path in folder.iterdir():  # a rename may reach the disk before the data do
        with path.open("rb") as file:
            os.fsync(file.fileno())
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    (folder / "meta.json").write_text(json.dumps({"bytes": sizes, "summary": summary}))


def _column(folder: Path, name: str, mode: str = "r") -> np.ndarray:
    return read_column(folder / name, DTYPES.get(name) or {"B": "u1", "Q": "u8"}[BUILDING[name]], mode)


def _write_records(folder: Path, records: Iterable[Record], group_by_query: bool, pair_columns: list[str]) -> dict:
    """Stream records into columns. With group_by_query adjacent records of one query and kind are one run of pairs."""
    numbers = BUILDING | {"size": "q"} | {column: PAIR[column] for column in pair_columns}
    texts, with_ids = ["query", "document"], "document_id" in pair_columns
    if with_ids:
        numbers, texts = numbers | {"query_id": "Q", "query_text_id": "Q"}, [*texts, "prompt"]
    counts = {"records": 0, "pairs": 0, "empty_documents": 0}
    run, size = None, 0
    with ColumnWriter(folder, numbers, texts) as writer:
        columns = writer.numbers
        for record in records:
            query, documents = record.query.encode(), [document.encode() for document in record.documents]
            asked = f"{record.prompt}\0".encode() + query if record.prompt else query  # prompts make other queries
            key = hashlib.blake2b(asked, digest_size=16).digest()
            kind = KINDS[record.format]
            if not group_by_query or not kind or run != (key, kind):
                if size:
                    columns["size"].append(size)
                run, size = (key, kind), 0
                writer.add_text("query", query)
                columns["key"].frombytes(key)
                columns["query_hash"].frombytes(key[:8])
                columns["kind"].append(kind)
                if with_ids:
                    writer.add_text("prompt", record.prompt.encode())
                    columns["query_id"].frombytes(text_id(record.prompt + record.query))
                    columns["query_text_id"].frombytes(text_id(record.query))
            if with_ids:
                columns["document_id"].frombytes(b"".join(map(text_id, record.documents)))
            for document in documents:
                writer.add_text("document", document)
                columns["pair_hash"].frombytes(hashlib.blake2b(key + document, digest_size=8).digest())
                columns["line"].append(record.line)
            columns["label"].extend(record.labels)
            columns["positive"].extend(record.positive)
            if record.teacher_scores is not None:
                columns["teacher"].extend(record.teacher_scores)
            size += len(documents)
            counts["records"] += 1
            counts["pairs"] += len(documents)
            if record.format != "text":
                counts["empty_documents"] += sum(not document.strip() for document in record.documents)
        columns["size"].append(size)
    return counts


def text_id(text: str) -> bytes:
    """8 bytes, equal for texts that are equal after Unicode normalization (NFKC) and with white space as one space."""
    folded = text if text.isascii() else unicodedata.normalize("NFKC", text)
    return hashlib.blake2b(" ".join(folded.split()).encode(), digest_size=8).digest()


# ---- groups of one query


def _merge_runs(folder: Path, pair_columns: list[str]) -> None:
    """Bring runs of the same query together, in order of first runs; does nothing where each has one run."""
    numbers, leaders = _number_runs(folder)
    if len(leaders) == len(numbers):
        return
    order = np.argsort(numbers, kind="stable")  # stable: file order within a query
    sizes = _column(folder, "size")
    starts = np.cumsum(sizes) - sizes
    _rewrite(folder, "document", [*pair_columns, "pair_hash"], _row_chunks(starts[order], sizes[order]))
    _rewrite(folder, "query", ["kind"], _row_chunks(leaders, np.ones_like(leaders)))
    if "document_id" in pair_columns:
        _rewrite(folder, "prompt", ["query_id", "query_text_id"], _row_chunks(leaders, np.ones_like(leaders)))
    merged = np.zeros(len(leaders), np.int64)
    np.add.at(merged, numbers, sizes)
    _replace(folder / "size", merged)


def _number_runs(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """(group of each run, first run of each group); groups numbered by first appearance.

    Compares 16-byte hashes by sorting: a dict of queries would hold 200 bytes for each.
    """
    keys, kinds = _column(folder, "key").reshape(-1, 2).copy(), _column(folder, "kind")
    alone = np.flatnonzero(kinds == 0)
    keys[alone, 0], keys[alone, 1] = alone, 0
    order = np.lexsort((keys[:, 1], keys[:, 0], kinds))  # stable: the first of equal keys is the first run
    keys, kinds = keys[order], kinds[order]
    is_new = np.ones(len(order), bool)
    is_new[1:] = (keys[1:] != keys[:-1]).any(axis=1) | (kinds[1:] != kinds[:-1])
    first_run = np.empty_like(order)
    first_run[order] = order[is_new][np.cumsum(is_new) - 1]
    is_leader = first_run == np.arange(len(order))
    return (np.cumsum(is_leader) - 1)[first_run], np.flatnonzero(is_leader)


def _drop_repeated_documents(folder: Path, pair_columns: list[str]) -> None:
    """Each document once in a group of triples, which repeat a positive for each of its negatives. A document that
    is both counts as a positive."""
    if not (_column(folder, "kind") == TRIPLE).any():
        return
    sizes = []

    def kept_rows() -> Iterator[np.ndarray]:
        kinds, hashes, positive = (_column(folder, name) for name in ("kind", "pair_hash", "positive"))
        for groups, pairs, size, first in _group_chunks(folder):
            group = np.repeat(np.arange(len(size)), size)
            order = np.lexsort((~positive[pairs], hashes[pairs], group))  # stable: the first in the file comes first
            same = (group[order][1:] == group[order][:-1]) & (hashes[pairs][order][1:] == hashes[pairs][order][:-1])
            kept = np.ones(len(order), bool)
            kept[order[1:]] = ~same
            kept |= np.repeat(kinds[groups] != TRIPLE, size)
            sizes.append(np.add.reduceat(kept, first, dtype=np.int64))
            yield pairs.start + np.flatnonzero(kept)

    _rewrite(folder, "document", [*pair_columns, "pair_hash"], kept_rows())
    _replace(folder / "size", np.concatenate(sizes))


def _rewrite(folder: Path, texts: str, numbers: list[str], chunks: Iterator[np.ndarray]) -> None:
    """Replace a column of texts and the numbers beside it by the given rows, in their order."""
    new = folder / "new"
    new.mkdir()
    text, offsets = memoryview(read_column(folder / texts, "u1")), read_column(folder / f"{texts}.offsets", "i8")
    # rows, since a pair has a score of each teacher
    values = {name: _column(folder, name).reshape(len(offsets) - 1, -1) for name in numbers}
    with ColumnWriter(new, {}, [texts]) as writer:
        files = {name: (new / name).open("wb") for name in numbers}
        for rows in chunks:
            ends = zip(offsets[rows].tolist(), offsets[rows + 1].tolist(), strict=True)
            for start, end in ends:
                writer.add_text(texts, text[start:end])
            for name, file in files.items():
                values[name][rows].tofile(file)
        for file in files.values():
            file.close()
    for path in new.iterdir():
        path.rename(folder / path.name)
    new.rmdir()


def _replace(path: Path, values: np.ndarray) -> None:
    values.tofile(path.with_name("new"))  # not the file itself, which may be mapped
    path.with_name("new").rename(path)


def _row_chunks(starts: np.ndarray, sizes: np.ndarray) -> Iterator[np.ndarray]:
    """The row numbers start..start + size - 1 of each stretch, some thousand stretches at a time."""
    for begin in range(0, len(starts), CHUNK):
        size = sizes[begin : begin + CHUNK]
        shift = starts[begin : begin + CHUNK] - (np.cumsum(size) - size)
        yield np.repeat(shift, size) + np.arange(size.sum())


def _group_chunks(folder: Path) -> Iterator[tuple[slice, slice, np.ndarray, np.ndarray]]:
    """(groups, their pairs, their sizes, their first pairs counted from the chunk's first pair)."""
    sizes = _column(folder, "size")
    pair = 0
    for begin in range(0, len(sizes), CHUNK):
        size = np.array(sizes[begin : begin + CHUNK])
        stop = pair + int(size.sum())
        yield slice(begin, begin + len(size)), slice(pair, stop), size, np.cumsum(size) - size
        pair = stop


def _mark_positives(folder: Path) -> None:
    """`records.positives` for whole groups of pointwise pairs, which were marked one by one."""
    labels, kinds, positive = _column(folder, "label"), _column(folder, "kind"), _column(folder, "positive", "r+")
    for groups, pairs, sizes, first in _group_chunks(folder):
        label = labels[pairs]
        low, high = np.minimum.reduceat(label, first), np.maximum.reduceat(label, first)
        threshold = np.repeat(np.where(high > low, low, 0), sizes)
        of_pointwise = np.repeat(kinds[groups] == POINTWISE, sizes)
        positive[pairs] = np.where(of_pointwise, label > threshold, positive[pairs])


def _require_one_positive(folder: Path, name: str) -> None:
    """DataError naming the first line of each pointwise group without exactly one 1 and the rest 0."""
    labels, lines, kinds = _column(folder, "label"), _column(folder, "line"), _column(folder, "kind")
    bad_lines = BadLines()
    for groups, pairs, sizes, first in _group_chunks(folder):
        label = labels[pairs]
        ones = np.add.reduceat(label == 1, first, dtype=int)
        zeros = np.add.reduceat(label == 0, first, dtype=int)
        bad = (kinds[groups] == POINTWISE) & ((ones != 1) | (zeros != sizes - 1))
        for group in np.flatnonzero(bad).tolist():
            values = label[first[group] : first[group] + sizes[group]].tolist()
            found = f"the pairs of this query have the labels {describe_labels(values)}"
            bad_lines.add(f"{name}:{lines[pairs.start + first[group]]}: {found}; {ONE_POSITIVE_EXPECTED}")
    bad_lines.raise_any()


def _average_teachers(folder: Path, name: str) -> None:
    """One teacher's score of each pair in place of those of several."""
    scores, starts = _column(folder, "teacher").reshape(len(_column(folder, "label")), -1), _column(folder, "first")
    try:
        _replace(folder / "teacher", average_teachers(scores, starts))
    except ValueError as error:
        raise DataError(f"{name}: {error}") from error


def _write_groups(folder: Path) -> None:
    with open(folder / "first", "wb") as first_file, open(folder / "group", "wb") as group_file:
        for groups, pairs, sizes, first in _group_chunks(folder):
            (pairs.start + first).tofile(first_file)
            np.repeat(np.arange(groups.start, groups.stop, dtype=np.int32), sizes).tofile(group_file)


# ---- counts


def _summarise(folder: Path, counts: dict[str, int]) -> StoreSummary:
    labels, sizes = _column(folder, "label"), _column(folder, "size")
    equal = 0
    for _, pairs, _, first in _group_chunks(folder):
        label = labels[pairs]
        equal += int((np.minimum.reduceat(label, first) == np.maximum.reduceat(label, first)).sum())
    return StoreSummary(
        records=counts["records"],
        groups=len(sizes),
        pairs=len(labels),
        queries=_count_distinct(folder, "query_hash"),
        repeated_pairs=counts["pairs"] - _count_distinct(folder, "pair_hash"),
        empty_documents=counts["empty_documents"],
        equal_label_groups=equal,
        smallest_group=int(sizes.min()),
        largest_group=int(sizes.max()),
        label_histogram=label_histogram(labels),
    )


def _count_distinct(folder: Path, name: str) -> int:
    """Distinct 64-bit hashes, sorted in the file's own pages. One collision is expected at six billion."""
    hashes = _column(folder, name, "r+")
    hashes.sort()
    distinct = 1
    for begin in range(0, len(hashes), CHUNK):
        part = hashes[begin : begin + CHUNK + 1]
        distinct += int((part[1:] != part[:-1]).sum())
    return distinct
