"""Data sets in BEIR layout and runs: queries, judgments (qrels), candidate lists, ranked lists.

    corpus.jsonl[.gz]               {"_id", "title" (optional), "text"}
    queries.jsonl[.gz]              {"_id", "text"}, of all splits: those of a split are the ones that its qrels name
    qrels/<split>.tsv[.gz]          query-id, corpus-id, grade, between tabs; with or without a header
    candidates.<split>.tsv[.gz]     query-id, corpus-id; only where the set is a judged pool: rank only those
    runs/bm25.<split>.tsv[.gz]      query-id, corpus-id, score; optional

A run is a file of lines `query Q0 document rank score name` (TREC, columns between spaces or tabs) or
`query document score` (between tabs). Its rank column is not read: as in trec_eval, the scores alone give the order.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rag_retrieval.core.files import atomic_write
from rag_retrieval.data.json_lines import byte_lines, decoded, json_objects, text_of
from rag_retrieval.data.records import DataError
from rag_retrieval.metrics import trec_order

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


MOST_GRADE = 999_999_999  # what trec_eval holds on every platform

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
    """Raises DataError where a file is missing, at a bad line, and at an _id that is repeated or has spaces."""
    path = Path(path)
    corpus, queries = find_file(path, "corpus.jsonl"), find_file(path, "queries.jsonl")
    documents: dict[str, str] = {}
    for line, entry in json_objects(corpus):
        place = f"{corpus}:{line}"
        id_ = text_of(entry, "_id", place)
        check_id(id_, place)
        if id_ in documents:
            raise DataError(f"{place}: the _id {id_!r} was given before; give each document its own.")
        documents[id_] = document_text(entry, place)
    if not documents:
        raise DataError(f"{corpus}: found no documents; expected one per line.")
    texts = query_texts(queries)
    for id_ in texts:
        check_id(id_, str(queries))
    return BeirFolder(path, documents, texts)


def check_id(id_: str, place: str) -> None:
    """Raises DataError for an id that a column of a run file cannot hold."""
    if id_.split() != [id_]:
        raise DataError(f"{place}: _id is {id_!r}; expected a text without spaces.")


def read_qrels(folder: BeirFolder, split: str) -> Qrels:
    """Grades of a split, zeros too. Raises DataError for a missing file, a bad line or an unknown query."""
    path = find_qrels(folder.path, split)
    qrels: Qrels = {}
    for line, query, document, grade in judgments(path):
        if query not in folder.queries:
            raise DataError(f"{path}:{line}: queries.jsonl has no query {query!r}; add it there.")
        if not grade.is_integer() or abs(grade) > MOST_GRADE:
            expected = f"expected a whole number of at most {MOST_GRADE:,}"
            raise DataError(f"{path}:{line}: the grade is {grade:g}; {expected}.")
        qrels.setdefault(query, {})[document] = int(grade)
    return qrels


def read_pool(folder: BeirFolder, split: str) -> Pool | None:
    """The judged pool of each query; None where the whole corpus is ranked. DataError for an unknown document."""
    path = find_optional(folder.path, f"candidates.{split}.tsv")
    if path is None:
        return None
    pool: Pool = {}
    for line, (query, document) in table_rows(path, "query-id, corpus-id"):
        if document not in folder.documents:
            raise DataError(f"{path}:{line}: corpus.jsonl has no document {document!r}; add it there.")
        pool.setdefault(query, []).append(document)
    return pool


def read_run(path: str | Path) -> Run:
    """Scores by query and document. Raises DataError with file and line for a line that is neither format, a
    score that is no finite number, or a document twice for one query."""
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {found}; expected a TREC run file.")
    run: Run = {}
    for line, raw in byte_lines(path):
        fields = decoded(raw, f"{path}:{line}").split()
        if not fields or (line == 1 and fields[0] == "query-id"):
            continue
        query, document, score = _columns(fields, path, line)
        documents = run.setdefault(query, {})
        if document in documents:
            raise DataError(f"{path}:{line}: document {document!r} stands twice for query {query!r}; keep one.")
        documents[document] = _score(score, path, line)
    if not run:
        raise DataError(f"{path}: found no line of a run; expected query, Q0, document, rank, score, name.")
    return run


def _columns(fields: list[str], path: Path, line: int) -> tuple[str, str, str]:
    if len(fields) == 6:
        return fields[0], fields[2], fields[4]
    if len(fields) == 3:
        return fields[0], fields[1], fields[2]
    expected = "expected six (query Q0 document rank score name) or three (query document score)"
    raise DataError(f"{path}:{line}: found {len(fields)} columns; {expected}.")


def _score(text: str, path: Path, line: int) -> float:
    try:
        score = float(text)
    except ValueError:
        score = math.nan
    if not math.isfinite(score):
        raise DataError(f"{path}:{line}: the score is {text!r}; expected a finite number.")
    return score


def write_run(path: Path, run: Run, name: str) -> None:
    """A TREC run file, whole or not at all. Scores keep every digit.

    name: of the system, for the last column; its spaces become underscores. Documents stand by falling score and
    those of equal score as trec_eval takes them (`trec_order`), so that the ranks are those that are measured.
    """
    label = "_".join(name.split()) or "run"
    with atomic_write(path) as aside, aside.open("w", encoding="utf-8") as file:
        for query, scores in run.items():
            for rank, document in enumerate(trec_order(scores), start=1):
                file.write(f"{query} Q0 {document} {rank} {scores[document]!r} {label}\n")
