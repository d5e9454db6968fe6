"""What each retriever finds for judged queries: words, an embedder, an index, vectors in files, or a TREC run."""

import logging
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from rag_retrieval.core.distributed import on_main, own_device
from rag_retrieval.core.files import digest_of
from rag_retrieval.data.beir import (
    BeirFolder,
    Run,
    best_of,
    find_file,
    find_optional,
    query_texts,
    read_folder,
    read_qrels,
    read_run,
)
from rag_retrieval.data.corpus import Corpus
from rag_retrieval.data.documents import read_documents
from rag_retrieval.evaluate.ranking_data import RankingData, without_identical_ids
from rag_retrieval.evaluate.retrieval_config import RetrievalEvaluationConfig, is_index
from rag_retrieval.evaluate.systems import check_relevant
from rag_retrieval.evaluate.vector_files import Documents, document_vectors, search_vectors
from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.metrics import is_relevant
from rag_retrieval.models.representations import DENSE
from rag_retrieval.retrieval.best_passage import QueryWords, query_words
from rag_retrieval.retrieval.bm25 import BM25
from rag_retrieval.retrieval.candidates import Candidates
from rag_retrieval.retrieval.encoding import encode_with, open_embedder
from rag_retrieval.retrieval.fusion import Fusion
from rag_retrieval.retrieval.index import Index, build_index
from rag_retrieval.retrieval.index_files import fingerprint
from rag_retrieval.retrieval.retriever import FUSED, Retriever, timed
from rag_retrieval.retrieval.searched import ENCODE, Searched

logger = logging.getLogger(__name__)

DIGEST = 16  # characters


@dataclass(frozen=True)
class Retrieved:
    """What one retriever found. name: in tables. stages: runs by the name of the stage, the last of which a reranker
    gets. texts: of all documents found, by id. relevant: texts of the relevant documents, found or not. absent:
    relevant documents that its corpus lacks. identical_ids: queries that found a document with their own id, which was
    left out. fusion: of the index, which may have a weight for the reranker. seconds: a query, by stage and of "encode"
    (the query by the model), means over all queries; none of a run file. words: of each query with their weights in the
    search by words, for a report; none without such a search."""

    name: str
    stages: dict[str, Run]
    texts: dict[str, str]
    relevant: dict[str, str]
    absent: set[str]
    identical_ids: int
    fusion: Fusion | None = None
    seconds: dict[str, float] = field(default_factory=dict)
    words: dict[str, QueryWords] = field(default_factory=dict)

    @property
    def candidates(self) -> Run:
        return list(self.stages.values())[-1]

    def row(self, stage: str) -> str:
        """What a stage, one of these or a later one, is called in tables: as the retriever where it is its only one."""
        return self.name if list(self.stages) == [stage] else f"{self.name} {stage}"


def read_judged(config: RetrievalEvaluationConfig) -> RankingData:
    """Queries and grades of the split alone."""
    path = Path(config.data)
    folder = BeirFolder(path, {}, query_texts(find_file(path, "queries.jsonl")))
    name, qrels = f"{path.resolve().name} {config.split}", read_qrels(folder, config.split)
    check_relevant(name, qrels, config)
    if find_optional(path, f"candidates.{config.split}.tsv"):
        logger.warning("%s: the whole corpus is searched, not the lists of candidates.%s.tsv", path, config.split)
    return RankingData(name, {}, {query: folder.queries[query] for query in qrels}, qrels, {}, "")


def retrieve(
    config: RetrievalEvaluationConfig, retriever: str, name: str, judged: RankingData, indexes: Path
) -> Retrieved:
    if Path(retriever).is_file():
        return on_main(lambda: of_run_file(config, retriever, name, judged))
    if config.corpus_embeddings is not None:
        return of_vector_files(config, retriever, name, judged)
    folder = Path(retriever)
    if not is_index(retriever):
        folder = build_own_index(config, retriever, indexes / file_name(name))
    return on_main(lambda: of_index(config, folder, name, judged))


def build_own_index(config: RetrievalEvaluationConfig, retriever: str, place: Path) -> Path:
    """The index of `config.data` by this retriever, which is made where it is missing. Its name holds a digest of model
    and options; one that others made before is removed."""
    options = config.index_options(retriever)
    folder = place.with_name(f"{place.name}-{on_main(lambda: digest_of(fingerprint(options)))}")
    on_main(lambda: remove_others(folder))
    build_index(config.data, folder, options)
    return folder


def remove_others(folder: Path) -> None:
    beginning, end = folder.name[:-DIGEST], re.compile(f"[0-9a-f]{{{DIGEST}}}")
    folder.parent.mkdir(parents=True, exist_ok=True)
    for other in folder.parent.iterdir():
        if other != folder and other.name.startswith(beginning) and end.fullmatch(other.name[len(beginning) :]):
            shutil.rmtree(other)


def of_index(config: RetrievalEvaluationConfig, folder: Path, name: str, judged: RankingData) -> Retrieved:
    local = config.given("device", "devices") or {"device": str(own_device())}
    index, texts = Index(folder, trust_remote_code=config.trust_remote_code, **local), list(judged.queries.values())
    if folder in map(Path, config.retriever):  # and not one that was made for these data
        check_corpus(config, index)
    fusion, seconds = None, {}
    if config.query_model is None:
        retriever = Retriever(index)
        searched = retriever.searched(texts, wanted(config))
        found, fusion, seconds = [one.stages for one in searched], retriever.fusion, seconds_of_all(searched)
    else:
        queries = query_vectors(config, texts, next(index.vectors()).shape[1], seconds)
        none = [np.zeros(0, np.int64)] * len(texts)
        with timed(seconds, DENSE):
            found = [{DENSE: one} for one in index.searches[DENSE].search_vectors(queries, none, wanted(config))]
    of_one = of_candidates(config, name, judged, found, index.documents)
    words, bm25 = {}, index.searches.get(BM25)
    if config.report and bm25 is not None:
        words = {query: query_words(text, bm25) for query, text in judged.queries.items()}
    return replace(of_one, fusion=fusion, seconds=means_of(seconds, texts), words=words)


def seconds_of_all(searched: Sequence[Searched]) -> dict[str, float]:
    """Of all queries together. The searches have that already; the lists of each query are fused by themselves."""
    own = {FUSED: sum(one.seconds[FUSED] for one in searched)} if FUSED in searched[0].stages else {}
    return {**searched[0].seconds, **own}


def means_of(seconds: dict[str, float], queries: Sequence[str]) -> dict[str, float]:
    return {stage: of_all / len(queries) for stage, of_all in seconds.items()}


def of_vector_files(config: RetrievalEvaluationConfig, retriever: str, name: str, judged: RankingData) -> Retrieved:
    documents, options = Documents(read_folder(config.data).documents), config.index_options(retriever)
    embedder = open_embedder(options, own_device())
    encode = encode_with(embedder, "document", options)
    parts = document_vectors(Path(config.corpus_embeddings), documents.texts, encode, embedder.dim)

    def search() -> Retrieved:
        own, texts, seconds = embedder if config.query_model is None else None, list(judged.queries.values()), {}
        queries = query_vectors(config, texts, embedder.dim, seconds, own)
        with timed(seconds, DENSE):
            found = search_vectors(queries, parts, wanted(config), own_device())
        of_one = of_candidates(config, name, judged, [{DENSE: one} for one in found], documents)
        return replace(of_one, seconds=means_of(seconds, texts))

    return on_main(search)


def query_vectors(
    config: RetrievalEvaluationConfig,
    texts: list[str],
    width: int,
    seconds: dict[str, float],
    embedder: Embedder | None = None,
) -> np.ndarray:
    """By the embedder of the only retriever or, without it, the query model: float32 [texts, width]. Raises ValueError
    for another width. seconds: gets that of ENCODE, without the opening of the model."""
    name = config.query_model or config.retriever[0]
    options = config.index_options(name)
    encode = encode_with(embedder or open_embedder(options, own_device()), "query", options)
    with timed(seconds, ENCODE):
        vectors = encode(texts)
    if vectors.shape[1] != width:
        raise ValueError(f"query_model: vectors of {name} have {vectors.shape[1]} numbers, and those of the documents "
                         f"{width}; give two models that were trained together")  # fmt: skip
    return vectors


def of_candidates(
    config: RetrievalEvaluationConfig,
    name: str,
    judged: RankingData,
    found: Sequence[dict[str, Candidates]],
    documents: Corpus | Documents,
) -> Retrieved:
    stages: dict[str, Run] = {stage: {} for stage in found[0]}
    texts: dict[str, str] = {}
    for query, of_query in zip(judged.queries, found, strict=True):
        for stage, candidates in of_query.items():
            ids = {row: documents.id(row) for row in candidates.rows.tolist()}
            texts |= {id_: documents.text(row) for row, id_ in ids.items() if id_ not in texts}
            stages[stage][query] = dict(zip(ids.values(), candidates.scores.tolist(), strict=True))

    def text_of(id_: str) -> str | None:
        row = documents.row_of_id(id_)
        return None if row is None else documents.text(row)

    return retrieved(config, name, judged, stages, texts, text_of)


def check_corpus(config: RetrievalEvaluationConfig, index: Index) -> None:
    """Raises ValueError where the index does not hold the documents of the data, and no others."""
    total = other = 0
    for document in read_documents(config.data, index.options.passage_tokens):
        row, total = index.documents.row_of_id(document.id), total + 1
        other += row is None or index.documents.text(row) != document.text
    if other or total != len(index):
        raise ValueError(f"{index.folder}: holds {len(index):,} documents, and {config.data} {total:,}, of which "
                         f"{other:,} are not in it or have another text; give an index of this corpus")  # fmt: skip


def of_run_file(config: RetrievalEvaluationConfig, file: str, name: str, judged: RankingData) -> Retrieved:
    corpus = read_folder(config.data).documents
    run = best_of(read_run(file, judged.queries, corpus), list(judged.queries), None, wanted(config))
    texts = {document: corpus[document] for scores in run.values() for document in scores}
    return retrieved(config, name, judged, {"run": run}, texts, corpus.get)


def retrieved(
    config: RetrievalEvaluationConfig,
    name: str,
    judged: RankingData,
    stages: dict[str, Run],
    texts: dict[str, str],
    text_of: Callable[[str], str | None],
) -> Retrieved:
    """text_of: of a document of the corpus by its id, None for others."""
    relevant = {
        document: text_of(document)
        for grades in judged.qrels.values()
        for document, grade in grades.items()
        if is_relevant(grade, config.relevant_from)
    }
    absent = {document for document, text in relevant.items() if text is None}
    if len(absent) == len(relevant):
        raise ValueError(f"{name}: has none of the {len(relevant)} relevant documents of {judged.name}, such as "
                         f"{min(relevant)}; expected an index of the corpus of {config.data}")  # fmt: skip
    identical = 0
    if config.ignore_identical_ids:
        kept = {stage: without_identical_ids(run, config.depth) for stage, run in stages.items()}
        stages, identical = {stage: run for stage, (run, _) in kept.items()}, max(count for _, count in kept.values())
    present = {document: text for document, text in relevant.items() if text is not None}
    return Retrieved(name, stages, texts, present, absent, identical)


def wanted(config: RetrievalEvaluationConfig) -> int:
    return config.depth + config.ignore_identical_ids  # one more, in place of one that may be left out


def file_name(name: str) -> str:
    return "-".join(name.replace("/", " ").split())
