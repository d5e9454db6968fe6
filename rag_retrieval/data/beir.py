"""Data sets in BEIR layout and runs: queries, judgments (qrels), candidate lists, ranked lists.

    corpus.jsonl[.gz]               {"_id", "title" (optional), "text"}
    queries.jsonl[.gz]              {"_id", "text"}, of all splits: those of a split are the ones that its qrels name
    qrels/<split>.tsv[.gz]          query-id, corpus-id, score (the grade), between tabs; with or without a header
    candidates.<split>.tsv[.gz]     query-id, corpus-id; only where the set is a judged pool: rank only those
    runs/bm25.<split>.tsv[.gz]      query-id, corpus-id, score; optional

A run is a file of lines `query Q0 document rank score name` (TREC, columns between spaces or tabs) or
`query document score` (between tabs). Its rank column is not read: as in trec_eval, the scores alone give the order.
A header may name the columns in another order and by other usual names (`HEADER_NAMES`).
"""

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rag_retrieval.core.files import atomic_write
from rag_retrieval.data.readers import entry_text, read_records, row_objects, text_lines
from rag_retrieval.data.records import BadLines, DataError, Record, RecordRules, describe_labels
from rag_retrieval.metrics import trec_order

MOST_GRADE = 999_999_999  # what trec_eval holds on every platform
HEADER_NAMES = {  # in small letters, without hyphens, underscores and spaces
    "query": {"queryid", "qid", "query", "topic", "topicid"},
    "document": {"corpusid", "docid", "did", "documentid", "document", "docno", "passageid", "pid"},
    "score": {"score", "grade", "label", "relevance", "rel", "relevancegrade"},
}
# not float(), which takes 1_0, digits of other scripts, inf and nan
NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?", re.ASCII)

Qrels = dict[str, dict[str, int]]  # query id to document id to grade
Run = dict[str, dict[str, float]]  # query id to document id to score
Pool = dict[str, list[str]]  # query id to the ids of the only documents that are ranked for it


@dataclass(frozen=True)
class BeirFolder:
    """Texts by their id. A document's text is title, space and body; without a title the body alone."""

    path: Path
    documents: dict[str, str]
    queries: dict[str, str]


# ---- corpus and queries


def find_optional(folder: Path, name: str) -> Path | None:
    """`folder/name`, or `folder/name.gz`, or None."""
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def find_file(folder: Path, name: str) -> Path:
    """`folder/name`, or `folder/name.gz`. Raises DataError where neither is there."""
    path = find_optional(folder, name)
    if path is None:
        raise DataError(f"{folder}: found neither {name} nor {name}.gz; expected a folder in BEIR layout.")
    return path


def read_folder(path: str | Path) -> BeirFolder:
    """Raises DataError where a file is missing, at a bad line, and at an _id that is repeated or has spaces: a TREC run
    file, which `write_run` writes, separates its columns by them."""
    path = Path(path)
    corpus, queries = find_file(path, "corpus.jsonl"), find_file(path, "queries.jsonl")
    documents = {id_: document_text(entry, place) for place, id_, entry in _entries(corpus, "document")}
    if not documents:
        raise DataError(f"{corpus}: found no documents; expected one per line.")
    return BeirFolder(path, documents, query_texts(queries))


def query_texts(path: Path, spaces_in_ids: bool = False) -> dict[str, str]:
    """Texts of queries by their id. Raises DataError at the first bad line or repeated id."""
    return {id_: entry_text(entry, "text", place) for place, id_, entry in _entries(path, "query", spaces_in_ids)}


def document_text(entry: dict, place: str) -> str:
    """Title, space and body, or the body alone without a title. DataError where one is no string."""
    title = entry_text(entry, "title", place) if entry.get("title") is not None else ""
    body = entry_text(entry, "text", place)
    return f"{title} {body}" if title else body


def _entries(path: Path, kind: str, spaces_in_ids: bool = False) -> Iterator[tuple[str, str, dict]]:
    """(file:line, _id, object) of each line."""
    ids = set()
    for line, entry in row_objects(path):
        place = f"{path}:{line}"
        id_ = entry_text(entry, "_id", place)
        if id_ in ids:
            raise DataError(f"{place}: the _id {id_!r} was given before; give each {kind} its own.")
        if id_.split() != [id_] and not spaces_in_ids:
            raise DataError(f"{place}: _id is {id_!r}; expected a text without spaces.")
        ids.add(id_)
        yield place, id_, entry


# ---- judgments and candidate lists


def find_qrels(folder: Path, split: str) -> Path:
    """The judgments of a split. Raises DataError, with the splits that are there, where it has none."""
    try:
        return find_file(folder, f"qrels/{split}.tsv")
    except DataError as error:
        names = {path.name.removesuffix(".gz").removesuffix(".tsv") for path in (folder / "qrels").glob("*.tsv*")}
        there = f"the splits there: {', '.join(sorted(names))}" if names else "there is no qrels file at all"
        raise DataError(f"{str(error).removesuffix('.')} ({there}); set split.") from None


def judgments(path: Path) -> Iterator[tuple[int, str, str, float]]:
    """(line, query id, document id, finite grade) of a qrels file.

    Raises DataError at the first bad line, for a pair that is judged twice with different grades, and where there
    is no judgment. A line that says the same again is passed over.
    """
    grades: dict[tuple[str, str], float] = {}
    for line, (query, document, text) in _table_rows(path, ("query", "document", "score")):
        grade = _number(text, "grade", path, line)
        known = grades.setdefault((query, document), grade)
        if known != grade:
            found = f"document {document!r} of query {query!r} has the grade {text} here and {known:g} above"
            raise DataError(f"{path}:{line}: {found}; keep one.")
        yield line, query, document, grade
    if not grades:
        raise DataError(f"{path}: found no judgments; expected lines of query-id, corpus-id, score between tabs.")


def read_qrels(folder: BeirFolder, split: str) -> Qrels:
    """Grades of a split, zeros too. Raises DataError for a missing file, for a bad line, and with every unknown query
    and every grade that is not whole."""
    path = find_qrels(folder.path, split)
    qrels: Qrels = {}
    bad = BadLines()
    for line, query, document, grade in judgments(path):
        if query not in folder.queries:
            bad.add(f"{path}:{line}: queries.jsonl has no query {query!r}; add it there, or remove this line.")
        elif not _is_grade(grade):
            expected = f"expected a whole number of at most {MOST_GRADE:,}"
            bad.add(f"{path}:{line}: the grade is {grade:g}; {expected}.")
        else:
            qrels.setdefault(query, {})[document] = int(grade)
    bad.raise_any()
    return qrels


def read_pool(folder: BeirFolder, split: str) -> Pool | None:
    """The judged pool of each query; None where the whole corpus is ranked. DataError with every unknown document."""
    path = find_optional(folder.path, f"candidates.{split}.tsv")
    if path is None:
        return None
    pool: Pool = {}
    bad = BadLines()
    for line, (query, document) in _table_rows(path, ("query", "document")):
        if document not in folder.documents:
            bad.add(f"{path}:{line}: corpus.jsonl has no document {document!r}; add it there, or remove this line.")
        pool.setdefault(query, []).append(document)
    bad.raise_any()
    return pool


def _table_rows(path: Path, columns: tuple[str, ...]) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields in the order of `columns`) of a tab-separated file, without its header if it has one."""
    order = None
    for number, (line, text) in enumerate(text_lines(path)):
        fields = text.split("\t")
        if number == 0 and (order := _header_order(fields, columns)):
            continue
        if len(fields) != len(columns):
            found = f"found {len(fields)} column{'s' if len(fields) > 1 else ''} between tabs"
            expected = ", ".join(("query-id", "corpus-id", "score")[: len(columns)])
            raise DataError(f"{path}:{line}: {found}; expected {expected}.")
        yield line, [fields[place] for place in order] if order else fields


def _header_order(fields: list[str], columns: Sequence[str]) -> list[int] | None:
    """The place of each of `columns` in a header; None for a line that is no header."""
    plain = [re.sub(r"[-_ ]", "", field).lower() for field in fields]
    columns_of = [[place for place, name in enumerate(plain) if name in HEADER_NAMES[column]] for column in columns]
    if len(fields) == len(columns) and all(len(places) == 1 for places in columns_of):
        return [place for (place,) in columns_of]
    return None


def _number(text: str, what: str, path: Path, line: int) -> float:
    number = float(text) if NUMBER.fullmatch(text.strip()) else math.nan
    if not math.isfinite(number):
        header = " (if this line is a header, name its columns query-id, corpus-id, score)" if line == 1 else ""
        raise DataError(f"{path}:{line}: the {what} is {text!r}; expected a finite number{header}.")
    return number


def _is_grade(number: float) -> bool:
    return number.is_integer() and abs(number) <= MOST_GRADE


# ---- runs


def read_run(path: str | Path, queries: Collection[str] | None = None, documents: Collection[str] | None = None) -> Run:
    """Scores by query and document.

    queries, documents: the ids of the data, where the run must fit them. Raises DataError with file and line for a line
    that is neither format, a score that is no finite number, a document twice for one query, or one of `queries` with
    a document that is not among `documents`; and where the run has none of `queries`.
    """
    path = Path(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise DataError(f"{path}: {found}; expected a TREC run file.")
    run: Run = {}
    wanted, bad, order = None if queries is None else set(queries), BadLines(), None
    for number, (line, text) in enumerate(text_lines(path)):
        fields = text.split()
        if number == 0 and (order := _header_order(fields, ("query", "document", "score"))):
            continue
        query, document, score = _run_columns(fields, order, path, line)
        of_query = run.setdefault(query, {})
        if document in of_query:
            raise DataError(f"{path}:{line}: document {document!r} stands twice for query {query!r}; keep one.")
        if documents is not None and document not in documents and (wanted is None or query in wanted):
            bad.add(f"{path}:{line}: document {document!r} of query {query!r} is not in the data's corpus.")
        of_query[document] = _number(score, "score", path, line)
    if not run:
        raise DataError(f"{path}: found no line of a run; expected query, Q0, document, rank, score, name.")
    if wanted is not None and not wanted & run.keys():
        raise DataError(
            f"{path}: has none of the {len(wanted)} judged queries (such as {next(iter(queries))!r}), but {len(run)} "
            f"others (such as {next(iter(run))!r}); give the run of this split."
        )
    bad.raise_any()
    return run


def _run_columns(fields: list[str], order: list[int] | None, path: Path, line: int) -> tuple[str, str, str]:
    if len(fields) == 6:
        return fields[0], fields[2], fields[4]
    if len(fields) == 3:
        query, document, score = order or (0, 1, 2)
        return fields[query], fields[document], fields[score]
    expected = "expected six (query Q0 document rank score name) or three (query document score)"
    raise DataError(f"{path}:{line}: found {len(fields)} columns; {expected}.")


def write_run(path: Path, run: Run, name: str) -> None:
    """A TREC run file, whole or not at all; name: see `run_lines`."""
    with atomic_write(path) as temporary, temporary.open("w", encoding="utf-8") as file:
        for query, scores in run.items():
            file.writelines(run_lines(query, scores, name))


def run_lines(query: str, scores: Mapping[str, float], name: str) -> Iterator[str]:
    """The lines of one query in a TREC run file. Scores keep every digit.

    name: of the system, for the last column; its spaces become underscores. Documents stand by falling score and
    those of equal score as trec_eval takes them (`trec_order`), so that the ranks are those that are measured. Raises
    DataError for a document whose id is no single word.
    """
    label = "_".join(name.split()) or "run"
    for rank, document in enumerate(trec_order(scores), start=1):
        if document.split() != [document]:
            found = f"the document id {document!r} has spaces, which a TREC run cannot hold"
            raise DataError(f"{found}; give it another id, or take JSON for the results of a search.")
        yield f"{query} Q0 {document} {rank} {scores[document]!r} {label}\n"


def best_of(run: Run, queries: Sequence[str], pool: Pool | None, depth: int) -> Run:
    """The best `depth` documents of each query, of the pool where there is one; in trec_eval's order."""
    best = {}
    for query in queries:
        scores = run.get(query, {})
        if pool is not None:
            allowed = set(pool.get(query, ()))
            scores = {document: score for document, score in scores.items() if document in allowed}
        best[query] = {document: scores[document] for document in trec_order(scores)[:depth]}
    return best


# ---- files of ranking records


def read_record_file(path: Path) -> tuple[BeirFolder, Qrels]:
    """Texts and grades of a file of ranking records; pointwise pairs of one query are taken together, triples too.

    A query's id is `q` and its line, a document's that id and its place from 0. Raises DataError for bad lines.
    """
    records = list(read_records(path, RecordRules()))
    odd = next((record for record in records if not all(map(_is_grade, record.labels))), None)
    documents, queries, qrels, of_text, places = {}, {}, {}, {}, {}
    for record in records:
        query = f"q{record.line}"
        if record.format in ("pointwise", "triple"):
            query = of_text.setdefault((record.format, record.query), query)
        queries[query] = record.query
        grades = qrels.setdefault(query, {})
        for text, grade in zip(record.documents, _grades_of(record, odd, path), strict=True):
            document = f"{query}-{len(grades)}"
            if record.format == "triple":  # which repeats a positive for each of its negatives
                document = places.setdefault((query, text), document)
            documents[document], grades[document] = text, max(grade, grades.get(document, grade))
    return BeirFolder(path, documents, queries), qrels


def _grades_of(record: Record, odd: Record | None, path: Path) -> list[int]:
    """The labels, where all of the file are whole numbers. Else they are a teacher's scores: 1 for a document of
    `pos` and 0 for one of `neg`; DataError for the other formats, which do not say what is relevant.

    odd: the first record of the file with another label, if there is one.
    """
    if odd is None:
        return [int(label) for label in record.labels]
    if record.format in ("pos_neg", "triple"):
        return [int(positive) for positive in record.positive]
    raise DataError(
        f"{path}:{odd.line}: found the labels {describe_labels(odd.labels)}; expected whole grades of at most "
        f"{MOST_GRADE:,} in every record of the file, or records with pos and neg."
    )
