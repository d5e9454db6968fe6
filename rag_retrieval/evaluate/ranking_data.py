"""What a reranker is measured on: queries, judgments, and the candidates that are ranked.

Two sources: a folder in BEIR layout, whose candidates are found by BM25 or given as a run file, and a file of
ranking records, where the documents of a query are its candidates and all that is known of it. Figures are over all
judgments of a query: a relevant document that is not among the candidates counts in the ideal ranking, so a perfect
reranker of BM25's list stays below 1.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from rag_retrieval.data.beir import (
    BeirFolder,
    Pool,
    Qrels,
    Run,
    best_of,
    find_optional,
    read_folder,
    read_pool,
    read_qrels,
    read_record_file,
    read_run,
)
from rag_retrieval.retrieval.bm25 import BM25, bm25_run


@dataclass(frozen=True)
class RankingData:
    """Texts by id, grades by query and document, and the first-stage scores of the candidates of each query.

    candidates has every judged query, perhaps with no document. source: what found the candidates, for people.
    words: how the words that BM25 counted were made, "" where it did not count here. identical_ids: queries that had a
    document with their own id among their candidates, which was left out.
    """

    name: str
    documents: dict[str, str]
    queries: dict[str, str]
    qrels: Qrels
    candidates: Run
    source: str
    words: str = ""
    identical_ids: int = 0

    @property
    def num_pairs(self) -> int:
        return sum(map(len, self.candidates.values()))


class FirstStage(NamedTuple):
    """Candidates, and `source`, `words` and `identical_ids` of `RankingData`."""

    run: Run
    source: str
    words: str
    identical_ids: int


def read_ranking_data(
    path: str | Path,
    split: str,
    candidates: str | Path,
    depth: int,
    *,
    ignore_identical_ids: bool = True,
    language: str = "auto",
) -> RankingData:
    """The judged queries of a split with at most `depth` candidates each.

    path: a folder in BEIR layout, or a file of ranking records (which has no splits). candidates: "bm25" or a run
    file. BM25's are those of the folder's runs/bm25.<split>.tsv where there is one, else computed. Where the data
    list their own candidates (a pool, the documents of a record), these are ranked and no others.
    ignore_identical_ids: a document with the id of the query is no candidate of it, as in BEIR, some of whose queries
    are documents themselves (ArguAna, Quora). language: of BM25's words, see `words.tokenize`.
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
    options = {"ignore_identical_ids": ignore_identical_ids, "language": language}
    stage = first_stage(folder, split, list(qrels), pool, candidates, depth, **options)
    if not any(stage.run.values()):
        raise ValueError(f"{name}: {stage.source} has no candidate for any of the {len(qrels)} judged queries.")
    return RankingData(name, folder.documents, folder.queries, qrels, *stage)


def first_stage(
    folder: BeirFolder,
    split: str,
    queries: list[str],
    pool: Pool | None,
    candidates: str | Path,
    depth: int,
    *,
    ignore_identical_ids: bool = True,
    language: str = "auto",
) -> FirstStage:
    """The best `depth` candidates of `queries` (ids), perhaps none; fewer where the pool or the run has fewer."""
    wanted, words = depth + ignore_identical_ids, ""  # one more, in place of one that may be left out
    if str(candidates) == BM25:
        source = "BM25" if pool is None else "BM25 of the data's own lists"
        file = find_optional(folder.path, f"runs/bm25.{split}.tsv")
    else:
        source, file = Path(candidates).name, Path(candidates)
    if file is None:
        texts = {query: folder.queries[query] for query in queries}
        run, words = bm25_run(folder.documents, texts, pool, wanted, language)
    else:
        run = best_of(read_run(file, queries, folder.documents), queries, pool, wanted)
    if not ignore_identical_ids:
        return FirstStage(run, source, words, 0)
    kept, identical = without_identical_ids(run, depth)
    return FirstStage(kept, source, words, identical)


def without_identical_ids(run: Run, depth: int) -> tuple[Run, int]:
    """At most `depth` documents of each query without the one of its own id, and how many queries had such a one."""
    kept = {
        query: dict([(document, score) for document, score in documents.items() if document != query][:depth])
        for query, documents in run.items()
    }
    return kept, sum(query in documents for query, documents in run.items())
