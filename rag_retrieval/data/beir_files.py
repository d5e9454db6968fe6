"""The files of a folder in BEIR layout, read for evaluation and for mining alike.

    corpus.jsonl[.gz]           {"_id", "title" (optional), "text"}
    queries.jsonl[.gz]          {"_id", "text"}
    qrels/<split>.tsv[.gz]      query-id, corpus-id, grade, between tabs; with or without a header

The trap: queries.jsonl holds the queries of all splits. Those of a split are the ones that its qrels name.
"""

import math
from collections.abc import Iterator
from pathlib import Path

from rag_retrieval.data.json_lines import byte_lines, decoded, json_objects, text_of
from rag_retrieval.data.records import DataError

QRELS_COLUMNS = "query-id, corpus-id, grade"


def find_optional(folder: Path, name: str) -> Path | None:
    """`folder/name`, or `folder/name.gz`, or None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def find_file(folder: Path, name: str) -> Path:
    """`folder/name`, or `folder/name.gz`. Raises DataError where neither is there."""
    path = find_optional(folder, name)
    if path is None:
        raise DataError(f"{folder}: found neither {name} nor {name}.gz; expected a folder in BEIR layout.")
    return path


def find_qrels(folder: Path, split: str) -> Path:
    """The judgments of a split. Raises DataError, with the splits that are there, where it has none."""
    try:
        return find_file(folder, f"qrels/{split}.tsv")
    except DataError as error:
        names = {path.name.removesuffix(".gz").removesuffix(".tsv") for path in (folder / "qrels").glob("*.tsv*")}
        there = f"the splits there: {', '.join(sorted(names))}" if names else "there is no qrels file at all"
        raise DataError(f"{str(error).removesuffix('.')} ({there}); set split.") from None


def document_text(entry: dict, place: str) -> str:
    """Title, space and body, or the body alone without a title. DataError where one is no string."""
    title = text_of(entry, "title", place) if entry.get("title") is not None else ""
    body = text_of(entry, "text", place)
    return f"{title} {body}" if title else body


def query_texts(path: Path) -> dict[str, str]:
    """Texts of queries by their id. Raises DataError at the first bad line or repeated id."""
    texts: dict[str, str] = {}
    for line, entry in json_objects(path):
        place = f"{path}:{line}"
        id_, text = text_of(entry, "_id", place), text_of(entry, "text", place)
        if id_ in texts:
            raise DataError(f"{place}: the _id {id_!r} was given before; give each query its own.")
        texts[id_] = text
    return texts


def judgments(path: Path) -> Iterator[tuple[int, str, str, float]]:
    """(line, query id, document id, finite grade) of a qrels file.

    Raises DataError at the first bad line, for a pair that is judged twice with different grades, and where there
    is no judgment. A line that says the same again is passed over.
    """
    grades: dict[tuple[str, str], float] = {}
    for line, (query, document, text) in table_rows(path, QRELS_COLUMNS):
        grade = _grade(text, f"{path}:{line}")
        known = grades.setdefault((query, document), grade)
        if known != grade:
            found = f"document {document!r} of query {query!r} has the grade {text} here and {known:g} above"
            raise DataError(f"{path}:{line}: {found}; keep one.")
        yield line, query, document, grade
    if not grades:
        raise DataError(f"{path}: found no judgments; expected lines of {QRELS_COLUMNS}.")


def _grade(text: str, place: str) -> float:
    try:
        grade = float(text)
    except ValueError:
        grade = math.nan
    if not math.isfinite(grade):
        raise DataError(f"{place}: the grade is {text!r}; expected a number.")
    return grade


def table_rows(path: Path, columns: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a tab-separated file, without blank lines and the header if it has one."""
    wanted = columns.count(",") + 1
    for line, raw in byte_lines(path):
        text = decoded(raw, f"{path}:{line}").rstrip("\r\n")
        fields = text.split("\t")
        if not text.strip() or (line == 1 and fields[0] == "query-id"):
            continue
        if len(fields) != wanted:
            found = f"found {len(fields)} column{'s' if len(fields) > 1 else ''} between tabs"
            raise DataError(f"{path}:{line}: {found}; expected {columns}.")
        yield line, fields
