"""Folders in BEIR layout as evaluation holds them: all texts in memory, judgments and candidate lists of a split.

    candidates.<split>.tsv[.gz]     query-id, corpus-id; only where the set is a judged pool: rank only those
    runs/bm25.<split>.tsv[.gz]      query-id, corpus-id, score; optional

The trap: ids must be without spaces here, unlike in `beir_files`, since a TREC run file separates columns by them.
"""

from dataclasses import dataclass
from pathlib import Path

from rag_retrieval.data.beir_files import (
    document_text,
    find_file,
    find_optional,
    find_qrels,
    judgments,
    query_texts,
    table_rows,
)
from rag_retrieval.data.json_lines import json_objects, text_of
from rag_retrieval.data.records import DataError

MOST_GRADE = 999_999_999  # that pytrec-eval holds on every platform

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
