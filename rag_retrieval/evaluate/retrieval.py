"""`evaluate_retriever`: search a whole corpus with one retriever or several, rerank, measure every stage, compare.

Indexes are built and candidates scored by all processes of a launch together; the main process searches and sends the
others what it found.
"""

import importlib.util
import logging
import re
import shutil
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rag_retrieval.core.distributed import on_main, own_device, process_group
from rag_retrieval.core.files import digest_of
from rag_retrieval.data.beir import (
    BeirFolder,
    Qrels,
    Run,
    best_of,
    find_file,
    find_optional,
    query_texts,
    read_folder,
    read_qrels,
    read_run,
    write_run,
)
from rag_retrieval.data.corpus import Corpus
from rag_retrieval.evaluate.ranking_data import RankingData, without_identical_ids
from rag_retrieval.evaluate.retrieval_config import RetrievalEvaluationConfig, is_index
from rag_retrieval.evaluate.scoring import locked_output_dir, score_candidates
from rag_retrieval.evaluate.systems import (
    Evaluation,
    System,
    check_relevant,
    compared,
    default_output_dir,
    largest_changes,
    name_of,
    short_names,
    system_of,
)
from rag_retrieval.evaluate.vector_files import Documents, document_vectors, search_vectors
from rag_retrieval.infer.backend import open_backend
from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.metrics import is_relevant, means, parse_metric, perfect_run, trec_order
from rag_retrieval.models.options import ModelOptions
from rag_retrieval.retrieval.candidates import Candidates
from rag_retrieval.retrieval.dense import encode_with, open_embedder
from rag_retrieval.retrieval.index import Index, build_index
from rag_retrieval.retrieval.index_files import fingerprint
from rag_retrieval.retrieval.retriever import Retriever
from rag_retrieval.significance import Comparison

if TYPE_CHECKING:
    import pandas

logger = logging.getLogger(__name__)

DIGEST = 16  # characters


@dataclass(frozen=True)
class Judged:
    """The judged queries of a split: texts by id, grades by query and document."""

    name: str
    queries: dict[str, str]
    qrels: Qrels


@dataclass(frozen=True)
class Retrieved:
    """What one retriever found. name: in tables. stages: runs by the name of the stage, the last of which a reranker
    gets. texts: of all documents found, by id. absent: relevant documents that its corpus lacks. identical_ids: queries
    that found a document with their own id, which was left out."""

    name: str
    stages: dict[str, Run]
    texts: dict[str, str]
    absent: set[str]
    identical_ids: int

    @property
    def candidates(self) -> Run:
        return list(self.stages.values())[-1]

    @property
    def systems(self) -> dict[str, Run]:
        """Runs by the name of their row."""
        several = len(self.stages) > 1
        return {f"{self.name} {stage}" if several else self.name: run for stage, run in self.stages.items()}


@dataclass(frozen=True)
class Places:
    """Where the relevant documents of all measured queries are: among the first k, ranked below, not found within the
    depth, or not in the corpus at all, which no search mends."""

    first: int
    below: int
    not_found: int
    not_in_corpus: int


@dataclass(frozen=True)
class RetrievalEvaluation(Evaluation):
    """systems: a row for each stage of each retriever. before: the row that the others are compared with; after: the
    last. ceilings: a perfect order of each retriever's candidates, which no reranker surpasses. of_each: comparisons
    of each system but `before`, by its name. places: by system, with k of the first measure. recall: by system, of the
    first 1, 2, ... depth documents: float64 [depth]."""

    systems: list[System]
    ceilings: list[System]
    of_each: dict[str, list[Comparison]]
    places: dict[str, Places]
    recall: dict[str, np.ndarray]

    def table(self) -> list[dict[str, Any]]:
        """A row for each system: its name and its means."""
        return [{"name": system.name, **means(system.per_query)} for system in [*self.systems, *self.ceilings]]

    def to_pandas(self) -> "pandas.DataFrame":
        """The table, by name. ImportError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.table()).set_index("name")

    def _repr_html_(self) -> str:
        """The table, for a notebook."""
        head = "".join(f"<th>{escape(name)}</th>" for name in ("", *self.config.measures))
        body = ""
        for name, *figures in (row.values() for row in self.table()):
            cells = (escape(name), *(f"{figure:.4f}" for figure in figures))
            body += f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>"
        return f"<table><tr>{head}</tr>{body}</table>"


def evaluate_retriever(config: RetrievalEvaluationConfig, indexes: Path | None = None) -> RetrievalEvaluation:
    """Search `config.data` with every retriever, rerank where there is a reranker, measure, and compare.

    Under `accelerate launch` every process calls it. Indexes and scores are kept in `config.output_dir`, and the same
    call continues with them. Raises ValueError for models, indexes, data or files that cannot be used, and where
    `config.output_dir` is in use or has the results of other retrievers, another reranker or other data. indexes: a
    folder for those that are made here, which several evaluations share; None: in the output_dir.
    """
    with process_group():
        if config.report and importlib.util.find_spec("matplotlib") is None:
            raise ValueError("a report needs matplotlib; run: pip install -e '.[report]'")
        judged = read_judged(config)
        names = short_names(config.retriever)
        output_dir = Path(config.output_dir or default_output_dir("+".join(names), judged.name))
        with locked_output_dir(output_dir, config.model_dump(mode="json")):
            (output_dir / "runs").mkdir(exist_ok=True)
            pairs = zip(config.retriever, names, strict=True)
            place = indexes or output_dir / "indexes"
            found = [retrieve(config, retriever, name, judged, place) for retriever, name in pairs]
            reranked = rerank(config, found, judged, output_dir)
            return measure(config, judged, found, reranked, output_dir)


def read_judged(config: RetrievalEvaluationConfig) -> Judged:
    path = Path(config.data)
    folder = BeirFolder(path, {}, query_texts(find_file(path, "queries.jsonl")))
    judged = Judged(f"{path.resolve().name} {config.split}", folder.queries, read_qrels(folder, config.split))
    check_relevant(judged.name, judged.qrels, config)
    if find_optional(path, f"candidates.{config.split}.tsv"):
        logger.warning("%s: the whole corpus is searched, not the lists of candidates.%s.tsv", path, config.split)
    return Judged(judged.name, {query: folder.queries[query] for query in judged.qrels}, judged.qrels)


# ---- finding ---------------------------------------------------------------------------------------------


def retrieve(
    config: RetrievalEvaluationConfig, retriever: str, name: str, judged: Judged, indexes: Path
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


def of_index(config: RetrievalEvaluationConfig, folder: Path, name: str, judged: Judged) -> Retrieved:
    device, texts = config.device or str(own_device()), list(judged.queries.values())
    index = Index(folder, device=device)
    if config.query_model is None:
        found = Retriever(index, device=device).search_stages(texts, wanted(config))
    else:
        queries = query_vectors(config, texts, width=next(index.vectors()).shape[1])
        none = [np.zeros(0, np.int64)] * len(texts)
        found = [{"dense": one} for one in index.searches["dense"].search_vectors(queries, none, wanted(config))]
    return of_candidates(config, name, judged, found, index.documents)


def of_vector_files(config: RetrievalEvaluationConfig, retriever: str, name: str, judged: Judged) -> Retrieved:
    documents, options = Documents(read_folder(config.data).documents), config.index_options(retriever)
    embedder = open_embedder(options, own_device())
    encode = encode_with(embedder, "document", options)
    parts = document_vectors(Path(config.corpus_embeddings), documents.texts, encode, embedder.dim)

    def search() -> Retrieved:
        queries = query_vectors(config, list(judged.queries.values()), embedder.dim)
        found = search_vectors(queries, parts, wanted(config), own_device())
        return of_candidates(config, name, judged, [{"dense": one} for one in found], documents)

    return on_main(search)


def query_vectors(config: RetrievalEvaluationConfig, texts: list[str], width: int) -> np.ndarray:
    """By the query model, or the only retriever: float32 [texts, width]. Raises ValueError for another width."""
    name = config.query_model or config.retriever[0]
    options = config.index_options(name)
    vectors = encode_with(open_embedder(options, own_device()), "query", options)(texts)
    if vectors.shape[1] != width:
        raise ValueError(f"query_model: vectors of {name} have {vectors.shape[1]} numbers, and those of the documents "
                         f"{width}; give two models that were trained together")  # fmt: skip
    return vectors


def of_candidates(
    config: RetrievalEvaluationConfig,
    name: str,
    judged: Judged,
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
    return retrieved(config, name, judged, stages, texts, lambda id_: documents.row_of_id(id_) is not None)


def of_run_file(config: RetrievalEvaluationConfig, file: str, name: str, judged: Judged) -> Retrieved:
    corpus = read_folder(config.data).documents
    run = best_of(read_run(file, judged.queries, corpus), list(judged.queries), None, wanted(config))
    texts = {document: corpus[document] for scores in run.values() for document in scores}
    return retrieved(config, name, judged, {"run": run}, texts, corpus.__contains__)


def retrieved(
    config: RetrievalEvaluationConfig,
    name: str,
    judged: Judged,
    stages: dict[str, Run],
    texts: dict[str, str],
    is_in_corpus: Callable[[str], bool],
) -> Retrieved:
    relevant = {
        document
        for grades in judged.qrels.values()
        for document, grade in grades.items()
        if is_relevant(grade, config.relevant_from)
    }
    absent = {document for document in relevant if not is_in_corpus(document)}
    if len(absent) == len(relevant):
        raise ValueError(f"{name}: has none of the {len(relevant)} relevant documents of {judged.name}, such as "
                         f"{min(relevant)}; expected an index of the corpus of {config.data}")  # fmt: skip
    identical = 0
    if config.ignore_identical_ids:
        kept = {stage: without_identical_ids(run, config.depth) for stage, run in stages.items()}
        stages, identical = {stage: run for stage, (run, _) in kept.items()}, max(count for _, count in kept.values())
    return Retrieved(name, stages, texts, absent, identical)


def wanted(config: RetrievalEvaluationConfig) -> int:
    return config.depth + config.ignore_identical_ids  # one more, in place of one that may be left out


# ---- reranking and measuring -----------------------------------------------------------------------------


def rerank(
    config: RetrievalEvaluationConfig, found: Sequence[Retrieved], judged: Judged, output_dir: Path
) -> dict[str, Run]:
    """The candidates of each retriever with the reranker's scores, by the retriever's name; none without a reranker."""
    if config.reranker is None:
        return {}
    options = ModelOptions(**config.given("device", "devices", "dtype", "precision", "trust_remote_code"))
    if options.device is None and options.devices is None:
        options = options.model_copy(update={"device": own_device()})
    reranker, name = Reranker.from_backend(open_backend(config.reranker, options)), name_of(config.reranker)
    runs = {}
    for one in found:
        data = RankingData(judged.name, one.texts, judged.queries, judged.qrels, one.candidates, one.name)
        runs[one.name] = score_candidates(reranker, name, data, run_file(output_dir, f"{one.name} reranked"), config)
    return runs


def measure(
    config: RetrievalEvaluationConfig,
    judged: Judged,
    found: Sequence[Retrieved],
    reranked: dict[str, Run],
    output_dir: Path,
) -> RetrievalEvaluation:
    """All figures of all rows; the runs that are not reranked are written."""
    systems, ceilings, absent = [], [], {}
    for one in found:
        on_main(lambda one=one: write_runs(one, output_dir))
        rows = one.systems | ({f"{one.name} reranked": reranked[one.name]} if reranked else {})
        absent |= dict.fromkeys(rows, one.absent)
        systems += [system_of(name, run, judged.qrels, config) for name, run in rows.items()]
        best = perfect_run(judged.qrels, one.candidates)
        ceilings.append(system_of(f"{one.name} perfect order", best, judged.qrels, config))
    before, after = baseline_of(config, systems), systems[-1]
    last, texts = found[-1], {document: text for one in found for document, text in one.texts.items()}
    data = RankingData(judged.name, texts, judged.queries, judged.qrels, last.candidates, last.name,
                       identical_ids=max(one.identical_ids for one in found))  # fmt: skip
    of_each = {system.name: compared(before, system, config) for system in systems if system is not before}
    return RetrievalEvaluation(
        config=config,
        data=data,
        before=before,
        after=after,
        comparisons=of_each.get(after.name, []),
        changes=largest_changes(judged.qrels, before, after, config.measures[0]),
        output_dir=output_dir,
        systems=systems,
        ceilings=ceilings,
        of_each=of_each,
        places={system.name: places_of(system, judged.qrels, absent[system.name], config) for system in systems},
        recall={system.name: recall_by_depth(system, judged.qrels, config) for system in systems},
    )


def baseline_of(config: RetrievalEvaluationConfig, systems: list[System]) -> System:
    if config.baseline is None:
        return systems[0]
    by_name = {system.name: system for system in systems}
    if config.baseline not in by_name:
        raise ValueError(f"baseline: found no row {config.baseline!r}; expected one of {', '.join(by_name)}")
    return by_name[config.baseline]


def write_runs(found: Retrieved, output_dir: Path) -> None:
    for name, run in found.systems.items():
        write_run(run_file(output_dir, name), run, name)


def run_file(output_dir: Path, system: str) -> Path:
    return output_dir / "runs" / f"{file_name(system)}.trec"


def file_name(name: str) -> str:
    return "-".join(name.replace("/", " ").split())


def places_of(system: System, qrels: Qrels, absent: set[str], config: RetrievalEvaluationConfig) -> Places:
    counts = Counter()
    for query in system.per_query[config.measures[0]]:
        ranks = {document: rank for rank, document in enumerate(trec_order(system.run.get(query, {})), start=1)}
        for document, grade in qrels[query].items():
            if is_relevant(grade, config.relevant_from):
                rank = ranks.get(document)
                missing = "not_in_corpus" if document in absent else "not_found"
                counts[missing if rank is None else "first" if rank <= first_cutoff(config) else "below"] += 1
    return Places(*(counts[field] for field in Places.__dataclass_fields__))


def first_cutoff(config: RetrievalEvaluationConfig) -> int:
    """Documents that the first measure looks at, at most the depth."""
    return min(parse_metric(config.measures[0])[1] or config.depth, config.depth)


def recall_by_depth(system: System, qrels: Qrels, config: RetrievalEvaluationConfig) -> np.ndarray:
    """The mean share of the relevant documents among the first 1, 2, ... depth: float64 [depth]."""
    queries = system.per_query[config.measures[0]]
    total = np.zeros(config.depth)
    for query in queries:
        grades = [qrels[query].get(document, 0) for document in trec_order(system.run.get(query, {}))]
        ranks = np.flatnonzero(is_relevant(grades, config.relevant_from))
        steps = np.bincount(ranks, minlength=config.depth)[: config.depth]
        total += np.cumsum(steps) / is_relevant(list(qrels[query].values()), config.relevant_from).sum()
    return total / len(queries)
