"""Folders in BEIR layout: their texts and judgments, BM25 candidates, and ranking figures.

    corpus.jsonl[.gz]               {"_id", "title" (optional), "text"}
    queries.jsonl[.gz]              {"_id", "text"}
    qrels/<split>.tsv               query-id, corpus-id, grade; with a header
    candidates.<split>.tsv          query-id, corpus-id; only where the set is a judged pool: rank only those
    runs/bm25.<split>.tsv[.gz]      query-id, corpus-id, score; optional

The trap: figures are over all judgments of a query. A relevant document that is not among the candidates
counts in the ideal ranking, so even a perfect reranker of BM25's list stays below 1 (its figures are the
ceiling).
"""

import gzip
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import ir_measures
import numpy as np
from ir_measures import AP, RR, nDCG

Qrels = dict[str, dict[str, int]]  # query id to document id to grade
Run = dict[str, dict[str, float]]  # query id to document id to score, the best first

MEASURES = {"ndcg@10": nDCG @ 10, "mrr@10": RR @ 10, "map": AP}
K1, B = 1.2, 0.75  # of BM25
CHINESE_SHARE = 0.2  # of characters that are Han, from which on a corpus is cut as Chinese


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
    for line, (query, document, grade) in _table_rows(path, "query-id, corpus-id, grade"):
        if query not in folder.queries:
            raise ValueError(f"{path}:{line}: queries.jsonl has no query {query!r}; add it there.")
        qrels.setdefault(query, {})[document] = int(grade)
    return qrels


def read_pool(folder: BeirFolder, split: str) -> dict[str, set[str]] | None:
    """The judged pool of each query; None where the whole corpus is ranked."""
    path = folder.path / f"candidates.{split}.tsv"
    if not path.exists():
        return None
    pool: dict[str, set[str]] = {}
    for _, (query, document) in _table_rows(path, "query-id, corpus-id"):
        pool.setdefault(query, set()).add(document)
    return pool


def bm25_candidates(folder: BeirFolder, split: str, queries: list[str], depth: int) -> Run:
    """BM25's best `depth` documents for each of `queries` (ids): of the run file, else computed here.

    Fewer where a pool is smaller or fewer documents share a word with the query; perhaps none.
    """
    pool = read_pool(folder, split)
    run_file = _optional(folder.path, f"runs/bm25.{split}.tsv")
    run = _read_run(run_file) if run_file else _compute_bm25(folder, queries, pool)
    return {query: _best(run.get(query, {}), pool and pool.get(query, set()), depth) for query in queries}


def _best(scores: dict[str, float], pool: set[str] | None, depth: int) -> dict[str, float]:
    allowed = [(document, score) for document, score in scores.items() if pool is None or document in pool]
    return dict(sorted(allowed, key=lambda entry: -entry[1])[:depth])


def _read_run(path: Path) -> Run:
    run: Run = {}
    for _, (query, document, score) in _table_rows(path, "query-id, corpus-id, score"):
        run.setdefault(query, {})[document] = float(score)
    return run


def _compute_bm25(folder: BeirFolder, queries: list[str], pool: dict[str, set[str]] | None) -> Run:
    """Scores of all documents that share a word with the query; of the whole pool where there is one."""
    import bm25s

    words = chinese_words if is_chinese(folder.documents.values()) else english_words
    index = bm25s.BM25(k1=K1, b=B)
    index.index(words(list(folder.documents.values())), show_progress=False)
    ids = np.array(list(folder.documents))
    run = {}
    for query, tokens in zip(queries, words([folder.queries[query] for query in queries]), strict=True):
        scores = index.get_scores(tokens) if tokens else np.zeros(len(ids))
        kept = np.flatnonzero(scores > 0) if pool is None else np.arange(len(ids))
        run[query] = dict(zip(ids[kept].tolist(), scores[kept].tolist(), strict=True))
    return run


def is_chinese(texts, sample: int = 200) -> bool:
    beginning = "".join(text for _, text in zip(range(sample), texts, strict=False))
    han = sum("\u4e00" <= character <= "\u9fff" for character in beginning)
    return han > CHINESE_SHARE * len(beginning)


def english_words(texts: list[str]) -> list[list[str]]:
    """Stems in lower case without stop words."""
    import bm25s
    import Stemmer

    stemmer = Stemmer.Stemmer("english")
    return bm25s.tokenize(texts, stopwords="en", stemmer=stemmer, return_ids=False, show_progress=False)


def chinese_words(texts: list[str]) -> list[list[str]]:
    import jieba

    jieba.setLogLevel("WARNING")
    return [[word for word in jieba.cut(text.lower()) if word.strip()] for text in texts]


def measure(qrels: Qrels, run: Run) -> dict[str, float]:
    """nDCG@10, MRR@10 and MAP as trec_eval defines them, means over all queries of `qrels`.

    Gains are the grades, relevant is a grade of 1 or more. A query without a run counts 0.
    """
    values = ir_measures.calc_aggregate(list(MEASURES.values()), qrels, run)
    return {name: float(values[measured]) for name, measured in MEASURES.items()}


def perfect_run(qrels: Qrels, candidates: Run) -> Run:
    """The candidates in the best order there is: what no reranker of them can surpass."""
    return {
        query: {document: float(qrels[query].get(document, 0)) for document in documents}
        for query, documents in candidates.items()
    }


def _json_lines(folder: Path, name: str) -> Iterator[dict]:
    path = _find(folder, name)
    with _open(path) as file:
        for line, text in enumerate(file, start=1):
            try:
                entry = json.loads(text)
                entry["_id"], entry["text"]
            except (json.JSONDecodeError, KeyError, TypeError) as error:
                expected = f'expected a JSON object with "_id" and "text" ({error!r})'
                raise ValueError(f"{path}:{line}: {expected}.") from error
            yield entry


def _table_rows(path: Path, columns: str) -> Iterator[tuple[int, list[str]]]:
    """(line number, fields) of a tab-separated file, without the header if it has one."""
    with _open(path) as file:
        for line, text in enumerate(file, start=1):
            fields = text.rstrip("\r\n").split("\t")
            if line == 1 and fields[0] == "query-id":
                continue
            if len(fields) != columns.count(",") + 1:
                found = f"found {len(fields)} columns between tabs"
                raise ValueError(f"{path}:{line}: {found}; expected {columns}.")
            yield line, fields


def _find(folder: Path, name: str) -> Path:
    path = _optional(folder, name)
    if path is None:
        raise ValueError(f"{folder}: found neither {name} nor {name}.gz; expected a folder in BEIR layout.")
    return path


def _optional(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _open(path: Path):
    return gzip.open(path, "rt", encoding="utf-8") if path.suffix == ".gz" else path.open(encoding="utf-8")
