"""`evaluate_retriever`: search a whole corpus with one retriever or several, rerank, measure every stage, compare.

Indexes are built and candidates scored by all processes of a launch together; the main process searches and sends the
others what it found.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rag_retrieval.core.distributed import on_main, own_device, process_group
from rag_retrieval.data.beir import Qrels, Run, write_run
from rag_retrieval.evaluate.ranking_data import RankingData
from rag_retrieval.evaluate.retrieval_config import SHARED, RetrievalEvaluationConfig
from rag_retrieval.evaluate.retrievers import Retrieved, file_name, read_judged, retrieve
from rag_retrieval.evaluate.scoring import locked_output_dir, score_candidates
from rag_retrieval.evaluate.systems import (
    Evaluation,
    System,
    check_matplotlib,
    compared,
    default_output_dir,
    largest_changes,
    name_of,
    short_names,
    system_of,
)
from rag_retrieval.infer.backend import open_backend
from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.metrics import is_relevant, means, parse_metric, perfect_run, trec_order
from rag_retrieval.models.options import ModelOptions
from rag_retrieval.retrieval.best_passage import QueryWords
from rag_retrieval.retrieval.fusion import combine
from rag_retrieval.retrieval.retriever import COMBINED, RERANKED, timed
from rag_retrieval.significance import Comparison

if TYPE_CHECKING:
    import pandas


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
    """stages: by retriever and stage, in the order in which they work, a row each. before: the row that the others are
    compared with; after: the last. ceilings: a perfect order of each retriever's candidates, which no reranker
    surpasses. of_each: comparisons of each system but `before`, by its name. places: by system, with k of the first
    measure. recall: by system, of the first 1, 2, ... depth documents: float64 [depth]. absent: by retriever the
    relevant documents that its corpus lacks. seconds: by retriever a query's, as of `Retrieved` and of the reranker;
    without stages that were computed before. words: of each query, with the weights of the first retriever that
    searches by words."""

    stages: dict[str, dict[str, System]]
    ceilings: list[System]
    of_each: dict[str, list[Comparison]]
    places: dict[str, Places]
    recall: dict[str, np.ndarray]
    absent: dict[str, set[str]]
    seconds: dict[str, dict[str, float]]
    words: dict[str, QueryWords]

    @property
    def systems(self) -> list[System]:
        """The rows of all retrievers."""
        return [system for stages in self.stages.values() for system in stages.values()]

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
        if config.report:
            check_matplotlib()
        judged = read_judged(config)
        names = short_names(config.retriever)
        output_dir = Path(config.output_dir or default_output_dir("+".join(names), judged.name))
        with locked_output_dir(output_dir, config.model_dump(mode="json")):
            (output_dir / "runs").mkdir(exist_ok=True)
            pairs = zip(config.retriever, names, strict=True)
            place = indexes or output_dir / "indexes"
            found = [retrieve(config, retriever, name, judged, place) for retriever, name in pairs]
            reranked, seconds = rerank(config, found, judged, output_dir)
            found = [replace(one, seconds=one.seconds | seconds[one.name]) for one in found]
            return measure(config, judged, found, reranked, output_dir)


def rerank(
    config: RetrievalEvaluationConfig, found: Sequence[Retrieved], judged: RankingData, output_dir: Path
) -> tuple[dict[str, dict[str, Run]], dict[str, dict[str, float]]]:
    """By retriever and stage: its candidates with the reranker's scores and, where the fusion of its index has a weight
    for this reranker, with both scores combined; and the seconds of these stages, a query. Without a reranker none."""
    runs: dict[str, dict[str, Run]] = {one.name: {} for one in found}
    seconds: dict[str, dict[str, float]] = {one.name: {} for one in found}
    if config.reranker is None:
        return runs, seconds
    own = {} if config.devices else {"device": own_device()}
    options = ModelOptions(**own | config.given(*SHARED))
    reranker, name = Reranker.from_backend(open_backend(config.reranker, options)), name_of(config.reranker)
    for one in found:
        data = replace(judged, documents=one.texts, candidates=one.candidates, source=one.name)
        file = run_file(output_dir, one.row(RERANKED))
        runs[one.name][RERANKED], taken = score_candidates(reranker, name, data, file, config)
        if taken is not None:
            seconds[one.name][RERANKED] = taken
        weight = on_main(lambda one=one: one.fusion and one.fusion.weight_of(reranker.backend.name))
        if weight is not None:
            with timed(seconds[one.name], COMBINED):
                combined, row = combined_run(weight, one.candidates, runs[one.name][RERANKED]), one.row(COMBINED)
            seconds[one.name][COMBINED] /= len(combined)
            on_main(lambda run=combined, row=row: write_run(run_file(output_dir, row), run, row))
            runs[one.name][COMBINED] = combined
    return runs, seconds


def combined_run(weight: float, candidates: Run, reranked: Run) -> Run:
    run: Run = {}
    for query, documents in candidates.items():
        logits = np.array([reranked[query][document] for document in documents])
        scores = np.array(list(documents.values()))
        run[query] = dict(zip(documents, combine(weight, scores, logits).tolist(), strict=True))
    return run


def measure(
    config: RetrievalEvaluationConfig,
    judged: RankingData,
    found: Sequence[Retrieved],
    reranked: dict[str, dict[str, Run]],
    output_dir: Path,
) -> RetrievalEvaluation:
    """All figures of all rows; the runs that are not reranked are written."""
    stages, ceilings, places = {}, [], {}
    for one in found:
        on_main(lambda one=one: write_runs(one, output_dir))
        runs = one.stages | reranked[one.name]
        stages[one.name] = {name: system_of(one.row(name), run, judged.qrels, config) for name, run in runs.items()}
        places |= {each.name: places_of(each, judged.qrels, one.absent, config) for each in stages[one.name].values()}
        best = perfect_run(judged.qrels, one.candidates)
        ceilings.append(system_of(f"{one.name} perfect order", best, judged.qrels, config))
    systems = [system for of_one in stages.values() for system in of_one.values()]
    before, after = baseline_of(config, systems), systems[-1]
    texts = {document: text for one in found for document, text in one.texts.items()}
    relevant = {document: text for one in found for document, text in one.relevant.items()}
    identical = max(one.identical_ids for one in found)
    data = replace(judged, documents=texts | relevant, candidates=found[-1].candidates, identical_ids=identical)
    of_each = {system.name: compared(before, system, config) for system in systems if system is not before}
    return RetrievalEvaluation(
        config=config,
        data=data,
        before=before,
        after=after,
        comparisons=of_each.get(after.name, []),
        changes=largest_changes(judged.qrels, before, after, config.measures[0]),
        output_dir=output_dir,
        stages=stages,
        ceilings=ceilings,
        of_each=of_each,
        places=places,
        recall={system.name: recall_by_depth(system, judged.qrels, config, len(texts)) for system in systems},
        absent={one.name: one.absent for one in found},
        seconds={one.name: one.seconds for one in found},
        words=next((one.words for one in found if one.words), {}),
    )


def baseline_of(config: RetrievalEvaluationConfig, systems: list[System]) -> System:
    if config.baseline is None:
        return systems[0]
    by_name = {system.name: system for system in systems}
    if config.baseline not in by_name:
        raise ValueError(f"baseline: found no row {config.baseline!r}; expected one of {', '.join(by_name)}")
    return by_name[config.baseline]


def write_runs(found: Retrieved, output_dir: Path) -> None:
    for stage, run in found.stages.items():
        write_run(run_file(output_dir, found.row(stage)), run, found.row(stage))


def run_file(output_dir: Path, system: str) -> Path:
    return output_dir / "runs" / f"{file_name(system)}.trec"


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


def recall_by_depth(system: System, qrels: Qrels, config: RetrievalEvaluationConfig, found: int) -> np.ndarray:
    """The mean share of the relevant documents among the first 1, 2, ... depth: float64 [depth]. found: documents that
    any system found, beyond which the share of none grows."""
    queries, depth = system.per_query[config.measures[0]], max(1, min(config.depth, found))
    total = np.zeros(depth)
    for query in queries:
        grades = [qrels[query].get(document, 0) for document in trec_order(system.run.get(query, {}))]
        ranks = np.flatnonzero(is_relevant(grades, config.relevant_from))
        steps = np.bincount(ranks, minlength=depth)[:depth]
        total += np.cumsum(steps) / is_relevant(list(qrels[query].values()), config.relevant_from).sum()
    return total / len(queries)
