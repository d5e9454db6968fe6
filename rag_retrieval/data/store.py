"""A memory-mapped store of ranking records: built once, cached, shared by all processes that read it.

A store is a folder of columns (`columns`) in which the pairs of a group stand side by side: of each group `query`,
`first` (its first pair) and `size`; of each pair `document`, `group`, `label`, `positive`, `line`, and `teacher` where
a teacher's scores are read. For embedders there are `prompt`, `query_id` and `query_text_id` of each group and
`document_id` of each pair too. `meta.json` holds sizes and summary.

A file of pairs has one group per record unless it is opened with `group_by_query=True`; then pairs of the same query
form one group wherever they stand, triples too, and pair order is no longer file order.
"""

import hashlib
import json
import os
import shutil
import uuid
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock

from rag_retrieval.data.columns import Texts, read_column
from rag_retrieval.data.readers import checked_path, is_file, load_hub_dataset, read_records, source_name
from rag_retrieval.data.records import DataError, RecordRules
from rag_retrieval.data.store_build import DTYPES, FORMAT_VERSION, build_store

SAMPLE = 1 << 20  # bytes at each end of a source file that enter its cache key


class Pair(NamedTuple):
    query: str
    document: str
    label: float
    line: int


class Group(NamedTuple):
    """labels: float32, positives: bool, lines: int64, all [documents] and read-only."""

    query: str
    documents: list[str]
    labels: np.ndarray
    positives: np.ndarray
    lines: np.ndarray

    @property
    def line(self) -> int:
        """That of the first document."""
        return int(self.lines[0])


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
        if not 0 <= index < len(view.label):
            raise IndexError(f"pair {index} of a store with {len(view.label)} pairs")
        return Pair(view.query[view.group[index]], view.document[index], view.label[index], view.line[index])

    def query(self, group: int) -> str:
        """That of a group, alone."""
        return self._view.query[group]

    def group_of(self, pair: int) -> int:
        return self._view.group[pair]

    def group(self, index: int) -> Group:
        """The group 0 <= index < num_groups; IndexError outside (negative numbers too)."""
        view = self._view
        if not 0 <= index < len(view.first):
            raise IndexError(f"group {index} of a store with {len(view.first)} groups")
        start = view.first[index]
        stop = start + view.size[index]
        documents = [view.document[pair] for pair in range(start, stop)]
        labels, positives, lines = self.labels[start:stop], self.positives[start:stop], self.lines[start:stop]
        return Group(view.query[index], documents, labels, positives, lines)

    @cached_property
    def labels(self) -> np.ndarray:
        """float32 [pairs], read-only view of the file, as all arrays here are."""
        return self._numbers("label")

    @cached_property
    def positives(self) -> np.ndarray:
        """bool [pairs]."""
        return self._numbers("positive")

    @cached_property
    def lines(self) -> np.ndarray:
        """int64 [pairs]: the line of each in its source, from 1; the row for Parquet and hub data sets."""
        return self._numbers("line")

    @cached_property
    def teacher_scores(self) -> np.ndarray | None:
        """float32 [pairs], NaN where a document has none; None where the store was opened without a teacher_key."""
        return self._numbers("teacher") if "teacher" in self.meta["bytes"] else None

    @cached_property
    def query_ids(self) -> np.ndarray:
        """uint64 [groups], as `document_ids`, of prompt and query. Only in a store for embedders."""
        return self._numbers("query_id")

    @cached_property
    def query_text_ids(self) -> np.ndarray:
        """uint64 [groups], likewise, of the query without its prompt. Only in a store for embedders."""
        return self._numbers("query_text_id")

    @cached_property
    def document_ids(self) -> np.ndarray:
        """uint64 [pairs], equal for equal texts (NFKC, white space as one space). Only in a store for embedders."""
        return self._numbers("document_id")

    @cached_property
    def prompts(self) -> Texts:
        """Of each group, "" where its records have none. Only in a store for embedders."""
        return Texts(self.folder, "prompt")

    @cached_property
    def group_offsets(self) -> np.ndarray:
        """int64 [groups]: the first pair of each group, ascending."""
        return self._numbers("first")

    @cached_property
    def group_sizes(self) -> np.ndarray:
        """int64 [groups]: the number of documents of each group, at least 1."""
        return self._numbers("size")

    @cached_property
    def meta(self) -> dict:
        return json.loads((self.folder / "meta.json").read_text())

    @property
    def files(self) -> list[Path]:
        """The columns: equal contents are equal stores."""
        return [self.folder / name for name in sorted(self.meta["bytes"])]

    @cached_property
    def _view(self) -> "_View":
        return _View(self)

    def _numbers(self, name: str) -> np.ndarray:
        return read_column(self.folder / name, DTYPES[name])


class _View:
    """The columns as memoryviews: one element costs a third of numpy's access."""

    def __init__(self, store: RecordStore):
        self.query, self.document = Texts(store.folder, "query"), Texts(store.folder, "document")
        numbers = (store.group_offsets, store.group_sizes, store.labels, store.lines, store._numbers("group"))
        self.first, self.size, self.label, self.line, self.group = map(memoryview, numbers)


# ---- the cache


def open_store(
    source: str | Path,
    rules: RecordRules = RecordRules(),  # noqa: B008 -- frozen
    *,
    split: str = "train",
    group_by_query: bool = False,
    cache_dir: Path | None = None,
) -> RecordStore:
    """The store of a file or hub data set, built unless the cache has it; DataError with all bad lines.

    group_by_query: pointwise pairs of one query become one group, in the order of first appearance, and their
        positives are those of a hits record. Triples of one query become one group with each document once, a
        positive if it is one anywhere. Other records keep their own group.
        `rules.exactly_one_positive` then holds for these groups too. Without `rules.teacher_key` the store has no
        teacher scores, and without `rules.for_embedder` no ids.
    cache_dir: default $RAG_RETRIEVAL_CACHE, else ~/.cache/rag_retrieval. Nothing is ever deleted from it but
        damaged stores. The key holds the file's path, size, time and the content of its first and last MiB. A
        change between these is not noticed when size and time (to the nanosecond) are what they were before.

    Building needs about twice the source's size on disk for a while. Its memory does not grow with the
    source, but for group_by_query: about 50 bytes for each run of adjacent pairs of one query.
    """
    settings = [FORMAT_VERSION, asdict(rules), group_by_query]
    cache_dir = cache_folder(cache_dir)
    identity = _identity(source, split)
    key = hashlib.sha256(json.dumps([settings, identity]).encode()).hexdigest()[:32]
    folder = cache_dir / key
    # All processes of a run come here at once; the first builds and the others find the result.
    with FileLock(f"{folder}.lock"):
        if not _is_whole(folder):
            shutil.rmtree(folder, ignore_errors=True)
            _build_and_rename(folder, source, split, rules, group_by_query)
            if _identity(source, split) != identity:
                shutil.rmtree(folder)
                raise DataError(f"{source}: the source changed while it was read; start again.")
    return RecordStore(folder)


def cache_folder(name: str | Path | None = None) -> Path:
    """The folder, made where it is missing; default $RAG_RETRIEVAL_CACHE, else ~/.cache/rag_retrieval. Raises
    DataError."""
    name = name or os.environ.get("RAG_RETRIEVAL_CACHE") or "~/.cache/rag_retrieval"
    try:
        folder = Path(name).expanduser()
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError("it is not writable")
    except (OSError, RuntimeError) as error:  # RuntimeError: this user has no home folder
        advice = "set RAG_RETRIEVAL_CACHE to a folder that you may write to"
        raise DataError(f"{name}: cannot keep the cache of read data here: {error}; {advice}.") from error
    return folder


def _identity(source: str | Path, split: str) -> list:
    if not is_file(source):
        # The one thing that names the content of a loaded data set, whatever revision the hub gave.
        return [str(source), split, load_hub_dataset(str(source), split)._fingerprint]
    path = checked_path(source)
    status = path.stat()
    with path.open("rb") as file:
        digest = hashlib.sha256(file.read(SAMPLE))
        file.seek(max(0, status.st_size - SAMPLE))
        digest.update(file.read(SAMPLE))
    return [str(path.resolve()), status.st_size, status.st_mtime_ns, digest.hexdigest()]


def _is_whole(folder: Path) -> bool:
    """Whether all files have the recorded sizes and the groups hold all pairs; a flipped bit is not noticed."""
    store = RecordStore(folder)
    try:
        sizes = {path.name: path.stat().st_size for path in store.files}
        return sizes == store.meta["bytes"] and store.group_sizes.sum() == store.num_pairs
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _build_and_rename(folder: Path, source: str | Path, split: str, rules: RecordRules, group_by_query: bool) -> None:
    """Build under a temporary name, then rename: a folder under its own name is always complete."""
    temporary = folder.with_name(f"{folder.name}.building-{uuid.uuid4().hex[:8]}")
    records = read_records(source, rules, split=split)
    try:
        build_store(temporary, records, source_name(source, split), group_by_query, rules)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
