"""What a reranker is measured on: queries, judgments, and the candidates that are ranked.

Two sources: a folder in BEIR layout, whose candidates are found by BM25 or given as a run file, and a file of
ranking records, where the documents of a query are its candidates and all that is known of it. The trap:
figures are over all judgments of a query. A relevant document that is not among the candidates counts in the
ideal ranking, so a perfect reranker of BM25's list stays below 1.
"""

from dataclasses import dataclass
from pathlib import Path

from rag_retrieval.data.beir import (
    MOST_GRADE,
    BeirFolder,
    Pool,
    Qrels,
    Run,
    find_optional,
    read_folder,
    read_pool,
    read_qrels,
    read_run,
)
from rag_retrieval.data.readers import read_records
from rag_retrieval.data.records import DataError, Record, RecordRules, describe_labels
from rag_retrieval.evaluate.bm25 import BM25, bm25_run
from rag_retrieval.metrics import trec_order


@dataclass(frozen=True)
class RankingData:
    """Texts by id, grades by query and document, and the first-stage scores of the candidates of each query.

    candidates has every judged query, perhaps with no document. source: what found the candidates, for people.
    """

    name: str
    documents: dict[str, str]
    queries: dict[str, str]
    qrels: Qrels
    candidates: Run
    source: str

    @property
    def num_pairs(self) -> int:
        return sum(map(len, self.candidates.values()))

    @property
    def queries_without_candidates(self) -> int:
        return sum(not documents for documents in self.candidates.values())

    @property
    def judgments_without_document(self) -> int:
        """Judged documents that the corpus does not have: no reranker can find them, and they count as missed."""
        return sum(document not in self.documents for grades in self.qrels.values() for document in grades)


def read_ranking_data(path: str | Path, split: str, candidates: str | Path, depth: int) -> RankingData:
    """The judged queries of a split with at most `depth` candidates each.

    path: a folder in BEIR layout, or a file of ranking records (which has no splits). candidates: "bm25" or a run
    file. BM25's are those of the folder's runs/bm25.<split>.tsv where there is one, else computed. Where the data
    list their own candidates (a pool, the documents of a record), these are ranked and no others.
    Raises ValueError for files that cannot be read and for candidates that do not belong to the data.
    """
    path = Path(path)
    if path.is_dir():
        folder = read_folder(path)
        qrels, pool = read_qrels(folder, split), read_pool(folder, split)
        name = f"{path.resolve().name} {split}"
    else:
        folder, qrels = read_record_file(path)
        pool = {query: list(grades) for query, grades in qrels.items()}
        name = path.name
    run, source = first_stage(folder, split, list(qrels), pool, candidates, depth)
    if not any(run.values()):
        raise ValueError(f"{name}: {source} has no candidate for any of the {len(qrels)} judged queries.")
    return RankingData(name, folder.documents, folder.queries, qrels, run, source)


def first_stage(
    folder: BeirFolder, split: str, queries: list[str], pool: Pool | None, candidates: str | Path, depth: int
) -> tuple[Run, str]:
    """The candidates of `queries`, and what found them, for people."""
    if str(candidates) != BM25:
        run = read_run(candidates)
        check_run(run, folder, queries, Path(candidates))
        return best_of(run, queries, pool, depth), Path(candidates).name
    source = "BM25" if pool is None else "BM25 of the data's own lists"
    return bm25_candidates(folder, split, queries, pool, depth), source


def check_run(run: Run, folder: BeirFolder, queries: list[str], path: Path) -> None:
    """Raises ValueError where the run is of other queries or documents."""
    if not set(queries) & run.keys():
        raise ValueError(
            f"{path}: has none of the {len(queries)} judged queries (such as {queries[0]!r}), but {len(run)} others "
            f"(such as {next(iter(run))!r}); give the run of this split."
        )
    for query in queries:
        for document in run.get(query, ()):
            if document not in folder.documents:
                raise ValueError(f"{path}: document {document!r} of query {query!r} is not in the data's corpus.")


def bm25_candidates(folder: BeirFolder, split: str, queries: list[str], pool: Pool | None, depth: int) -> Run:
    """BM25's best `depth` documents for each of `queries` (ids): of the folder's run file, else computed here.

    Fewer where a pool is smaller or fewer documents share a word with the query; perhaps none.
    """
    file = find_optional(folder.path, f"runs/bm25.{split}.tsv")
    if file is None:
        return bm25_run(folder.documents, {query: folder.queries[query] for query in queries}, pool, depth)
    return best_of(read_run(file), queries, pool, depth)


def best_of(run: Run, queries: list[str], pool: Pool | None, depth: int) -> Run:
    """The best `depth` documents of each query, of the pool where there is one; in trec_eval's order."""
    best = {}
    for query in queries:
        scores = run.get(query, {})
        if pool is not None:
            allowed = set(pool.get(query, ()))
            scores = {document: score for document, score in scores.items() if document in allowed}
        best[query] = {document: scores[document] for document in trec_order(scores)[:depth]}
    return best


# ---- files of ranking records ---------------------------------------------------------------------------


def read_record_file(path: Path) -> tuple[BeirFolder, Qrels]:
    """Texts and grades of a file of ranking records; pointwise pairs of one query are taken together.

    A query's id is `q` and its line, a document's that id and its place from 0. Raises DataError for bad lines.
    """
    records = list(read_records(path, RecordRules()))
    odd = next((record for record in records if not all(map(is_grade, record.labels))), None)
    documents, queries, qrels, pointwise = {}, {}, {}, {}
    for record in records:
        query = f"q{record.line}"
        if record.format == "pointwise":
            query = pointwise.setdefault(record.query, query)
        queries[query] = record.query
        grades = qrels.setdefault(query, {})
        for text, grade in zip(record.documents, grades_of(record, odd, path), strict=True):
            document = f"{query}-{len(grades)}"
            documents[document], grades[document] = text, grade
    return BeirFolder(path, documents, queries), qrels


def is_grade(label: float) -> bool:
    return label.is_integer() and abs(label) <= MOST_GRADE


def grades_of(record: Record, odd: Record | None, path: Path) -> list[int]:
    """The labels, where all of the file are whole numbers. Else they are a teacher's scores: 1 for a document of
    `pos` and 0 for one of `neg`; DataError for the other formats, which do not say what is relevant.

    odd: the first record of the file with another label, if there is one.
    """
    if odd is None:
        return [int(label) for label in record.labels]
    if record.format == "pos_neg":
        return [int(positive) for positive in record.positive]
    raise DataError(
        f"{path}:{odd.line}: found the labels {describe_labels(odd.labels)}; expected whole grades of at most "
        f"{MOST_GRADE:,} in every record of the file, or records with pos and neg."
    )
