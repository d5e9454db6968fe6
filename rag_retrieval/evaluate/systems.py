"""What every evaluation has: systems that rank the queries, their figures, and where one gains and loses."""

import importlib.util
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rag_retrieval.data.beir import Qrels, Run
from rag_retrieval.evaluate.config import EvaluationKeys
from rag_retrieval.evaluate.ranking_data import RankingData
from rag_retrieval.metrics import PerQuery, is_relevant, query_metrics, trec_order
from rag_retrieval.models.settings import PACKAGE_PREFIX
from rag_retrieval.significance import Comparison, compare

SHOWN_QUERIES = 3  # that gained, and that lost
SHOWN_DOCUMENTS = 4


@dataclass(frozen=True)
class System:
    """One ranking of the queries: its name, its scores, and its figures per query."""

    name: str
    run: Run
    per_query: PerQuery


@dataclass(frozen=True)
class RankChange:
    """A document's ranks, from 1, in both runs; None where a run does not have it. grade: None unjudged."""

    document: str
    grade: int | None
    before: int | None
    after: int | None

    @property
    def weight(self) -> float:
        """The change of the discount 1 / log2(rank + 1), and twice that where a metric counts the document."""
        old, new = (0.0 if rank is None else 1 / np.log2(rank + 1) for rank in (self.before, self.after))
        return abs(new - old) * (2 if (self.grade or 0) > 0 else 1)

    def as_text(self) -> tuple[str, str]:
        """Grade, and ranks as `3 -> 1`; - where there is none."""
        grade, before, after = ("-" if value is None else str(value) for value in (self.grade, self.before, self.after))
        return grade, f"{before} -> {after}"


@dataclass(frozen=True)
class QueryChange:
    """The value of one metric for a query before and after, and its documents that changed rank, by their new one."""

    query: str
    before: float
    after: float
    documents: list[RankChange]


@dataclass(frozen=True)
class Evaluation:
    """before: the baseline. after: the system that is measured. comparisons: of the two, for each metric; none for a
    single query. changes: (gained, lost) most by the first metric."""

    config: EvaluationKeys
    data: RankingData
    before: System
    after: System
    comparisons: list[Comparison]
    changes: tuple[list[QueryChange], list[QueryChange]]
    output_dir: Path

    @property
    def measured(self) -> list[str]:
        """The judged queries with a relevant document, in the order of the data: the figures are of these."""
        return list(next(iter(self.after.per_query.values())))

    def relevant(self, query: str) -> int:
        """The number of relevant documents of a query, among its candidates or not."""
        return count_relevant(self.data.qrels[query], self.config)


def count_relevant(grades: dict[str, int], config: EvaluationKeys) -> int:
    return int(is_relevant(list(grades.values()), config.relevant_from).sum())


def check_relevant(name: str, qrels: Qrels, config: EvaluationKeys) -> None:
    """Raises ValueError where no query has a relevant document."""
    if not any(count_relevant(grades, config) for grades in qrels.values()):
        raise ValueError(
            f"{name}: none of the {len(qrels)} judged queries has a document of grade {config.relevant_from} or more; "
            "there is nothing to measure: lower relevant_from or judge more."
        )


def check_matplotlib() -> None:
    """Before anything is computed."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("a report needs matplotlib; run: pip install -e '.[report]'")


def system_of(name: str, run: Run, qrels: Qrels, config: EvaluationKeys) -> System:
    return System(name, run, query_metrics(qrels, run, config.measures, config.relevant_from))


def compared(before: System, after: System, config: EvaluationKeys) -> list[Comparison]:
    """For each metric; none for a single query."""
    several = len(after.per_query[config.measures[0]]) > 1
    return compare(before.per_query, after.per_query, config.significance, config.seed) if several else []


def name_of(model: str) -> str:
    """What a model is called in files and tables: its path from the current folder, or its name."""
    return str(Path(model).relative_to(Path.cwd())) if Path(model).is_relative_to(Path.cwd()) else model


def default_output_dir(model: str, data_name: str) -> Path:
    """runs/evaluate/MODEL-DATA; a run's model is called by its run: runs/my/model is `my`."""
    return Path("runs") / "evaluate" / "-".join([short_name(model), *data_name.split()])


def short_name(model: str) -> str:
    parts = [part for part in Path(model.removeprefix(PACKAGE_PREFIX)).parts if part not in ("/", "model")]
    return parts[-1] if parts else "model"


def short_names(retrievers: Sequence[str]) -> list[str]:
    """The last part of each path, `my` of runs/my/model; the whole path where two end alike."""
    short = [short_name(retriever) for retriever in retrievers]
    counts = Counter(short)
    return [name if counts[name] == 1 else name_of(own) for name, own in zip(short, retrievers, strict=True)]


def largest_changes(
    qrels: Qrels, before: System, after: System, metric: str
) -> tuple[list[QueryChange], list[QueryChange]]:
    """(gained most, lost most) by `metric`, at most `SHOWN_QUERIES` each, the largest first. Queries with equal changes
    keep the order of the data."""
    old, new = before.per_query[metric], after.per_query[metric]
    gains = {query: new[query] - value for query, value in old.items()}
    gained = [query for query in sorted(gains, key=lambda query: -gains[query]) if gains[query] > 1e-12]
    lost = [query for query in sorted(gains, key=gains.get) if gains[query] < -1e-12]

    def change(query: str) -> QueryChange:
        documents = changed_documents(qrels[query], before.run.get(query, {}), after.run.get(query, {}))
        return QueryChange(query, old[query], new[query], documents)

    return [change(query) for query in gained[:SHOWN_QUERIES]], [change(query) for query in lost[:SHOWN_QUERIES]]


def changed_documents(grades: dict[str, int], before: dict[str, float], after: dict[str, float]) -> list[RankChange]:
    """The `SHOWN_DOCUMENTS` of most weight that have another rank, by their new rank."""
    old, new = ({document: rank for rank, document in enumerate(trec_order(run), start=1)} for run in (before, after))
    changes = [
        RankChange(document, grades.get(document), old.get(document), new.get(document))
        for document in old.keys() | new
        if old.get(document) != new.get(document)
    ]
    changes.sort(key=lambda change: (-change.weight, change.document))
    return sorted(changes[:SHOWN_DOCUMENTS], key=lambda change: (change.after or np.inf, change.document))
