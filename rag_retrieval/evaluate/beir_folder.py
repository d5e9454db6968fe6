"""Folders in BEIR layout: their texts, judgments and candidate lists.

    corpus.jsonl[.gz]               {"_id", "title" (optional), "text"}
    queries.jsonl[.gz]              {"_id", "text"}
    qrels/<split>.tsv[.gz]          query-id, corpus-id, grade; with a header
    candidates.<split>.tsv[.gz]     query-id, corpus-id; only where the set is a judged pool: rank only those
    runs/bm25.<split>.tsv[.gz]      query-id, corpus-id, score; optional

The trap: queries.jsonl holds the queries of all splits. Those of a split are the ones that its qrels name.
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

Qrels = dict[str, dict[str, int]]  # query id to document id to grade
Run = dict[str, dict[str, float]]  # query id to document id to score
Pool = dict[str, list[str]]  # query id to the ids of the only documents that are ranked for it


@dataclass(frozen=True)
class BeirFolder:
    """Texts by their id. A document's text is title, space and body; without a title the body alone."""

    path: Path
    documents: dict[str, str]
    queries: dict[str, str]


def read_folder(path: str | Path) -> BeirFolder:
    """Raises ValueError where a file is missing or a line is no JSON object with "_id" and "text"."""
    path = Path(path)
    documents = {entry["_id"]: document_text(entry) for entry in _json_lines(path, "corpus.jsonl")}
    queries = {entry["_id"]: entry["text"] for entry in _json_lines(path, "queries.jsonl")}
    return BeirFolder(path, documents, queries)


def document_text(entry: dict) -> str:
    title = entry.get("title") or ""
    return f"{title} {entry['text']}" if title else entry["text"]


def read_qrels(folder: BeirFolder, split: str) -> Qrels:
    """Grades of a split, zeros too. Raises ValueError for a missing file, a bad line or an unknown query."""
    path = _find(folder.path, f"qrels/{split}.tsv")
    qrels: Qrels = {}
    for line, (query, document, grade) in table_rows(path, "query-id, corpus-id, grade"):
        if query not in folder.queries:
            raise ValueError(f"{path}:{line}: queries.jsonl has no query {query!r}; add it there.")
        qrels.setdefault(query, {})[document] = _grade(path, line, grade)
    if not qrels:
        raise ValueError(f"{path}: found no judgments; expected lines of query-id, corpus-id, grade.")
    return qrels


def _grade(path: Path, line: int, text: str) -> int:
    try:
        return int(text)
    except ValueError:
        raise ValueError(f"{path}:{line}: the grade is {text!r}; expected a whole number.") from None


def read_pool(folder: BeirFolder, split: str) -> Pool | None:
    """The judged pool of each query; None where the whole corpus is ranked. ValueError for an unknown document."""
    path = find_optional(folder.path, f"candidates.{split}.tsv")
    if path is None:
        return None
    pool: Pool = {}
    for line, (query, document) in table_rows(path, "query-id, corpus-id"):
        if document not in folder.documents:
            raise ValueError(f"{path}:{line}: corpus.jsonl has no document {document!r}; add it there.")
        pool.setdefault(query, []).append(document)
    return pool


def _json_lines(folder: Path, name: str) -> Iterator[dict]:
    path = _find(folder, name)
    with open_text(path) as file:
        for line, text in enumerate(file, start=1):
            try:
                entry = json.loads(text)
                identity, _ = entry["_id"], entry["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                expected = f'expected a JSON object with "_id" and "text" ({error!r})'
                raise ValueError(f"{path}:{line}: {expected}.") from error
            if not isinstance(identity, str) or identity.split() != [identity]:
                # a TREC run file separates its columns by spaces
                raise ValueError(f"{path}:{line}: _id is {identity!r}; expected a text without spaces.")
            yield entry


def table_rows(path: Path, columns: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a tab-separated file, without the header if it has one."""
    with open_text(path) as file:
        for line, text in enumerate(file, start=1):
            fields = text.rstrip("\r\n").split("\t")
            if line == 1 and fields[0] == "query-id":
                continue
            if len(fields) != columns.count(",") + 1:
                found = f"found {len(fields)} columns between tabs"
                raise ValueError(f"{path}:{line}: {found}; expected {columns}.")
            yield line, fields


def _find(folder: Path, name: str) -> Path:
    path = find_optional(folder, name)
    if path is None:
        raise ValueError(f"{folder}: found neither {name} nor {name}.gz; expected a folder in BEIR layout.")
    return path


def find_optional(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def open_text(path: Path):
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
