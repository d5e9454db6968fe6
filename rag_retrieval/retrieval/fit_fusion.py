"""Weights of a fusion from judged queries, and the command `fit-fusion`.

Every combination of weights in steps of 0.05 (of four stages 0.1) is measured, so the same lists give the same weights.
What the best one reaches on the queries that chose it says too much. So the queries are dealt into five parts, each is
measured with the weights that the other four choose, and by this figure the weights must beat each stage alone and
reciprocal ranks. Where they do not, the best of those is taken: where one side only hurts, the other side alone.

The weight of a reranker is fitted after these, in the same way: its scores and those of the list that it read are two
stages over the same documents, and reciprocal ranks are no choice.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from pydantic import Field, field_validator

from rag_retrieval.core.config import Config, FolderPath, ModelName, OutputPath, key
from rag_retrieval.core.terminal import plain_table, rendered
from rag_retrieval.data.beir import BeirFolder, find_file, query_texts, read_qrels
from rag_retrieval.data.records import DataError
from rag_retrieval.infer.results import EMPTY_SCORE
from rag_retrieval.metrics import PATTERNS, Qrels, Ranking, is_relevant, metric_value, parse_metric
from rag_retrieval.models.settings import model_content
from rag_retrieval.retrieval.candidates import Candidates
from rag_retrieval.retrieval.config import DEPTH
from rag_retrieval.retrieval.fusion import FUSION_FILE, Fusion

if TYPE_CHECKING:
    from rag_retrieval.retrieval.retriever import Retriever

STEPS = {2: 20, 3: 20}  # of a weight between 0 and 1, by the number of stages
STEPS_OF_MANY = 10  # 286 combinations of four stages, where 20 would be 1,771
FOLDS = 5  # parts of the queries
RRF, WEIGHTS = "reciprocal ranks", "fitted weights"


@dataclass(frozen=True)
class FusionFit:
    """chosen: a stage, `RRF` or `WEIGHTS`. fusion: what it means. weights: the best over all queries, chosen or not.
    values: the mean metric of each stage alone, of RRF where it was a choice, and of fitted weights on queries that did
    not choose them. fold_weights: what each four fifths of the queries chose."""

    chosen: str
    fusion: Fusion
    metric: str
    queries: int
    values: dict[str, float]
    weights: dict[str, float]
    fold_weights: list[dict[str, float]]

    def figures(self) -> dict[str, Any]:
        """All but the fusion, as JSON values."""
        figures = {name: value for name, value in asdict(self).items() if name not in ("fusion", "weights")}
        return {"best_weights": self.weights} | figures

    def describe(self) -> str:
        rows = [(f"  {name}", f"{value:.4f}", "*" * (name == self.chosen)) for name, value in self.values.items()]
        table = plain_table((f"{self.queries:,} queries", self.metric, "taken"), rows)
        best, *parts = dict.fromkeys(
            ", ".join(f"{stage} {weight:.2f}" for stage, weight in weights.items())
            for weights in (self.weights, *self.fold_weights)
        )
        others = f" (without one fifth of the queries also {'; '.join(parts)})" if parts else ""
        return rendered([table, f"best weights: {best}{others}"], 200)


class _JudgedQuery:
    """The lists of one query as arrays over the documents in any of them, for many weights.

    spreads, ranks: what a stage of weight 1 gives to each document: [stages, documents]. found: whether it has it. A
    document with the id of the query is not ranked, as in BEIR.
    """

    def __init__(
        self, query: str, lists: Mapping[str, Candidates], grades: Mapping[str, float], id_of: Callable[[int], str]
    ):
        rows = np.unique(np.concatenate([candidates.rows for candidates in lists.values()]))
        ids = [id_of(row) for row in rows.tolist()]
        self.id_order = np.argsort(np.argsort(np.array([id_.encode() for id_ in ids], np.bytes_)))
        self.grades = np.array([grades.get(id_, 0) for id_ in ids], np.float32)
        self.judged = np.array(list(grades.values()), np.float32)
        others = np.array(ids) != query
        self.found = np.array([np.isin(rows, candidates.rows) & others for candidates in lists.values()])
        self.spreads, self.ranks = (np.zeros(self.found.shape) for _ in range(2))
        even = Fusion(dict.fromkeys(lists, 1.0))
        for place, (stage, candidates) in enumerate(lists.items()):
            of_stage = np.searchsorted(rows, candidates.rows)
            self.spreads[place, of_stage] = even.shares(stage, candidates)
            self.ranks[place, of_stage] = Fusion().shares(stage, candidates)

    def value(self, metric: str, weights: np.ndarray, shares: np.ndarray, highest: float) -> float:
        """weights: [stages]. shares: `spreads` or `ranks`."""
        ranked = np.flatnonzero(self.found[weights > 0].any(axis=0))
        scores = (weights @ shares[:, ranked]).astype(np.float32)
        order = ranked[np.lexsort((self.id_order[ranked], scores))[::-1]]  # of equal scores as `metrics.trec_order`
        return metric_value(metric, Ranking(self.grades[order], self.judged, 1.0, highest))


def fit_fusion(
    found: Mapping[str, Mapping[str, Candidates]],
    qrels: Qrels,
    id_of: Callable[[int], str],
    metric: str = "ndcg@10",
    ranks: bool = True,
) -> FusionFit:
    """found: by query and stage, two stages at least, the same of every query. id_of: of a document's row. ranks:
    whether reciprocal ranks are a choice.

    Queries without a relevant document (a grade of at least 1) are left out. Raises ValueError for fewer than five.
    """
    names = sorted(query for query in found if is_relevant(list(qrels[query].values()), 1).any())
    if len(names) < FOLDS:
        raise ValueError(f"fit-fusion needs at least {FOLDS} queries with a relevant document, found {len(names)}")
    stages = list(found[names[0]])
    queries = [_JudgedQuery(name, found[name], qrels[name], id_of) for name in names]
    highest = max(grade for grades in qrels.values() for grade in grades.values())
    grid = np.array(list(_combinations(len(stages))))
    values = np.array([[query.value(metric, weights, query.spreads, highest) for query in queries] for weights in grid])
    rrf = [query.value(metric, np.ones(len(stages)), query.ranks, highest) for query in queries if ranks]
    folds = [np.arange(len(names)) % FOLDS == fold for fold in range(FOLDS)]
    chosen_by_fold = [_best(grid, values[:, ~fold].mean(axis=1)) for fold in folds]
    held_out = np.concatenate([values[best, fold] for best, fold in zip(chosen_by_fold, folds, strict=True)])
    alone = {stage: values[grid[:, place] == 1].mean() for place, stage in enumerate(stages)}
    figures = alone | ({RRF: np.mean(rrf)} if ranks else {}) | {WEIGHTS: held_out.mean()}
    figures = {name: float(value) for name, value in figures.items()}
    chosen = max(figures, key=lambda name: round(figures[name], 6))  # the first of equal ones, so a stage before both
    best = _by_stage(stages, grid[_best(grid, values.mean(axis=1))])
    of_stage = {stage: float(stage == chosen) for stage in stages}
    weights = {RRF: None, WEIGHTS: best}.get(chosen, of_stage)
    fold_weights = [_by_stage(stages, grid[one]) for one in chosen_by_fold]
    return FusionFit(chosen, Fusion(weights), metric, len(names), figures, best, fold_weights)


def fit_reranker(
    found: Mapping[str, Mapping[str, Candidates]], qrels: Qrels, id_of: Callable[[int], str], metric: str = "ndcg@10"
) -> FusionFit:
    """The weights of a reranker and of what it read. found: by query the two lists, first what the reranker read and
    then its own, with its logits. Documents without text come last in any case and are left out. Errors as there."""
    return fit_fusion({query: _with_text(lists) for query, lists in found.items()}, qrels, id_of, metric, ranks=False)


def _with_text(lists: Mapping[str, Candidates]) -> dict[str, Candidates]:
    reranked = list(lists.values())[-1]
    empty = reranked.rows[reranked.scores <= EMPTY_SCORE]
    keep = {stage: ~np.isin(of.rows, empty) for stage, of in lists.items()}
    return {stage: replace(of, rows=of.rows[keep[stage]], scores=of.scores[keep[stage]]) for stage, of in lists.items()}


def _combinations(stages: int) -> Iterator[tuple[float, ...]]:
    """All weights of so many stages in equal steps whose sum is 1."""
    steps = STEPS.get(stages, STEPS_OF_MANY)
    for counts in product(range(steps + 1), repeat=stages - 1):
        if sum(counts) <= steps:
            yield tuple(count / steps for count in (*counts, steps - sum(counts)))


def _best(grid: np.ndarray, means: np.ndarray) -> int:
    """The row of the grid with the highest mean; of several, the one nearest to their middle."""
    equal = np.flatnonzero(means >= means.max() - 1e-9)
    return int(equal[np.abs(grid[equal] - grid[equal].mean(axis=0)).sum(axis=1).argmin()])


def _by_stage(stages: Sequence[str], weights: np.ndarray) -> dict[str, float]:
    return dict(zip(stages, weights.tolist(), strict=True))


# ---- the command


class FitFusionConfig(Config):
    """One fit."""

    main_keys: ClassVar = ("index", "data", "split", "reranker", "metric")

    index: FolderPath = Field(min_length=1, description="Folder that rag-retrieval index wrote.")
    data: FolderPath = Field(
        min_length=1, description="Folder in BEIR layout with judged queries, whose documents have the index's ids."
    )
    split: str = key("The qrels/SPLIT.tsv to fit on, not the one that is measured on.", "dev", min_length=1)
    reranker: ModelName | None = key(
        "Folder, hub name, or package:NAME of a reranker to fit a weight for; needed where the index has one search.",
        min_length=1,
    )
    metric: str = key(f"What is maximised, one of {PATTERNS}.", "ndcg@10", min_length=1)
    depth: int = key("Documents of each stage, also of the reranker, as many as searches will ask for.", DEPTH, ge=1)
    output: OutputPath | None = key(f"The file to write. Absent: {FUSION_FILE} in the index, for all its searches.")
    device: str | None = key("Such as cpu or cuda:0. Absent: a GPU if there is one.", min_length=1)
    trust_remote_code: bool = key("Run Python code that comes with a model.", False)

    @field_validator("metric")
    @classmethod
    def _known_metric(cls, name: str) -> str:
        parse_metric(name)
        return name


def run(config: FitFusionConfig) -> str:
    from rag_retrieval.infer.reranker import open_reranker
    from rag_retrieval.retrieval.retriever import Retriever

    folder = Path(config.data)
    texts = query_texts(find_file(folder, "queries.jsonl"))
    qrels = read_qrels(BeirFolder(folder, {}, texts), config.split)
    options = {"device": config.device, "trust_remote_code": config.trust_remote_code}
    reranker = config.reranker and open_reranker(config.reranker, **options)
    retriever = Retriever(config.index, fusion=Fusion(), depth=config.depth, **options)
    documents = retriever.index.documents
    if len(retriever.stages) < 2 and reranker is None:
        raise ValueError(f"{config.index}: its only stage is {retriever.stages[0]}; a fusion needs two, or a reranker")
    if all(documents.row_of_id(document) is None for grades in qrels.values() for document in grades):
        raise DataError(f"{folder}: none of the judged documents is in {config.index}; give the data of this index")
    queries = {query: texts[query] for query in qrels}
    fusion, fits, taken = Fusion(), {}, []
    if len(retriever.stages) > 1:
        fits["stages"] = fit_fusion(lists_of(retriever, queries, retriever.stages), qrels, documents.id, config.metric)
        fusion, taken = fits["stages"].fusion, [fits["stages"].chosen]
    if reranker is not None:
        retriever = Retriever(retriever.index, reranker=reranker, fusion=fusion, depth=config.depth)
        fits["reranker"] = fit_reranker(lists_of(retriever, queries), qrels, documents.id, config.metric)
        weight = list(fits["reranker"].fusion.weights.values())[-1]
        fusion = replace(fusion, reranker_weight=weight, reranker=model_content(reranker.backend.name))
        taken.append(f"reranker {weight:.2f}")
    file = Path(config.output) if config.output else Path(config.index) / FUSION_FILE
    file.parent.mkdir(parents=True, exist_ok=True)
    about = {"data": folder.name, "split": config.split, "depth": config.depth}
    fusion.save(file, about | {name: fit.figures() for name, fit in fits.items()})
    return "\n".join([*(fit.describe() for fit in fits.values()), f"{file}: {', '.join(taken)}"])


def lists_of(
    retriever: "Retriever", queries: Mapping[str, str], stages: Sequence[str] | None = None
) -> dict[str, dict[str, Candidates]]:
    """What the stages found, by query; without `stages` the last two."""
    lists = retriever.search_stages(list(queries.values()))
    names = stages or list(lists[0])[-2:]
    return {query: {stage: of[stage] for stage in names} for query, of in zip(queries, lists, strict=True)}
