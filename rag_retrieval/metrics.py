"""Ranking metrics as trec_eval defines them: one definition for the training log and for evaluation.

Ties: scores are taken in float32, and of equal ones the document with the greater id ranks first. Ids of a run compare
as bytes; a document of a training group has its place in the group for an id, so that of equal scores the last one of
the file ranks first. Files often list the positive first, and a model that scores all pairs alike gains nothing by it.

Queries without a relevant document are left out of every mean, and counted: no ranking of them is better than another.

To add a metric, write its function and enter it in `METRICS`; configuration, errors, training log, curves and report
read the table.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

Qrels = Mapping[str, Mapping[str, float]]  # query id to document id to grade
Run = Mapping[str, Mapping[str, float]]  # query id to document id to score
PerQuery = dict[str, dict[str, float]]  # metric to query id to value

LOGGED_METRICS = ("ndcg@10", "mrr@10", "map")  # of the training log
AT_START, P_VALUE = "_at_start", "_p_value"  # after a name: the value before training, a test of the change
MOST_CUTOFF = 10**9


@dataclass(frozen=True)
class Ranking:
    """What a metric sees of one query.

    grades: [ranked documents], float32, from rank 1; 0 where a document is not judged.
    judged: [judged documents], float32, all grades of the query, of documents that are not ranked too.
    relevant_from: the smallest grade of a relevant document. highest: the highest grade of the data set, at least 0.
    """

    grades: np.ndarray
    judged: np.ndarray
    relevant_from: float = 1.0
    highest: float = 1.0

    @property
    def relevant(self) -> np.ndarray:
        """[ranked documents], bool."""
        return is_relevant(self.grades, self.relevant_from)

    @property
    def num_relevant(self) -> int:
        return int(is_relevant(self.judged, self.relevant_from).sum())


def ndcg(ranking: Ranking, k: int) -> float:
    """Gain = grade (a negative one counts 0), discount 1 / log2(rank + 1); Järvelin and Kekäläinen (2002) with
    trec_eval's linear gain. The ideal ranking is over all judged documents. 0.0 when no grade is above 0."""
    ideal = _dcg(np.sort(ranking.judged)[::-1], k)
    return _dcg(ranking.grades, k) / ideal if ideal > 0 else 0.0


def _dcg(grades: np.ndarray, k: int) -> float:
    gains = np.maximum(grades[:k].astype(np.float64), 0.0)
    return float(np.sum(gains / np.log2(np.arange(2, gains.size + 2))))


def reciprocal_rank(ranking: Ranking, k: int) -> float:
    """1 / rank of the first relevant document; 0.0 when none is among the first k."""
    hits = np.flatnonzero(ranking.relevant[:k])
    return 1.0 / (int(hits[0]) + 1) if hits.size else 0.0


def average_precision(ranking: Ranking) -> float:
    """The precision at the rank of each relevant document, 0 for those not ranked, over all relevant ones."""
    ranks = np.flatnonzero(ranking.relevant) + 1
    return float(np.sum(np.arange(1, ranks.size + 1) / ranks)) / max(ranking.num_relevant, 1)


def recall(ranking: Ranking, k: int) -> float:
    """The share of the relevant documents that is among the first k."""
    return int(ranking.relevant[:k].sum()) / max(ranking.num_relevant, 1)


def precision(ranking: Ranking, k: int) -> float:
    """Relevant documents among the first k, over k (also where fewer are ranked)."""
    return int(ranking.relevant[:k].sum()) / k


def expected_reciprocal_rank(ranking: Ranking, k: int) -> float:
    """sum over ranks r up to k of 1/r R_r prod_{i < r} (1 - R_i), with R_i = (2^grade_i - 1) / 2^highest.

    Chapelle et al., "Expected Reciprocal Rank for Graded Relevance" (CIKM 2009), equations 4 and 5. A negative grade
    counts 0. highest is that of the data, where the paper has that of the scale.
    """
    grades = np.maximum(ranking.grades[:k].astype(np.float64), 0.0)
    stops = np.exp2(grades - ranking.highest) - np.exp2(-float(ranking.highest))
    goes_on = np.cumprod(np.concatenate([[1.0], 1.0 - stops[:-1]])) if stops.size else stops
    return float(np.sum(stops * goes_on / np.arange(1, stops.size + 1)))


@dataclass(frozen=True)
class Metric:
    """function: (ranking, k) to a value in [0, 1] where it has a cutoff, else (ranking).

    reads: what of the judgments, "relevance" (grades from relevant_from on) or "grades". meaning: for help and pages.
    """

    name: str
    function: Callable[..., float]
    has_cutoff: bool
    reads: str
    meaning: str

    @property
    def pattern(self) -> str:
        return f"{self.name}@k" if self.has_cutoff else self.name


METRICS: dict[str, Metric] = {
    metric.name: metric
    for metric in (
        Metric("ndcg", ndcg, True, "grades", "normalized discounted cumulative gain, with grades as gains"),
        Metric("mrr", reciprocal_rank, True, "relevance", "reciprocal rank of the first relevant document"),
        Metric("map", average_precision, False, "relevance", "average precision"),
        Metric("recall", recall, True, "relevance", "share of the relevant documents among the first k"),
        Metric("p", precision, True, "relevance", "share of relevant ones among the first k"),
        Metric("err", expected_reciprocal_rank, True, "grades", "expected reciprocal rank, with grades as chances"),
    )
}
PATTERNS = ", ".join(metric.pattern for metric in METRICS.values())


def parse_metric(name: str) -> tuple[Metric, int | None]:
    """A metric and its cutoff, from a name such as ndcg@10 or map. Raises ValueError for any other text."""
    match = re.fullmatch(r"([a-z_]+)(?:@([1-9][0-9]{0,9}))?", name)
    metric = METRICS.get(match[1]) if match else None
    if metric is None or metric.has_cutoff != bool(match[2]) or int(match[2] or 1) > MOST_CUTOFF:
        raise ValueError(f"found {name!r}; expected one of {PATTERNS}, such as ndcg@10, with k up to {MOST_CUTOFF:,}")
    return metric, int(match[2]) if match[2] else None


def metric_value(name: str, ranking: Ranking) -> float:
    metric, k = parse_metric(name)
    return metric.function(ranking, k) if metric.has_cutoff else metric.function(ranking)


def is_relevant(grades: ArrayLike, relevant_from: float) -> np.ndarray:
    # both in float32, as labels are from file to loss: 0.7 in float32 is below 0.7 in float64
    return np.asarray(grades, dtype=np.float32) >= np.float32(relevant_from)


def relevance_threshold(labels: np.ndarray) -> float:
    """From which label on a document counts as relevant in MRR and MAP: 1 for whole-numbered labels
    (trec_eval's default), else the middle of their range (soft labels in [0, 1] would never reach 1)."""
    if not len(labels) or np.all(labels == np.round(labels)):
        return 1.0
    return float(labels.min() + labels.max()) / 2


def trec_order(scores: Mapping[str, float]) -> list[str]:
    """Documents in the order in which they are ranked: score in float32 falling, then id falling, as bytes."""
    documents = list(scores)
    values = np.fromiter(scores.values(), np.float32, len(documents))
    ids = np.array([document.encode() for document in documents], dtype=np.bytes_)
    return [documents[place] for place in np.lexsort((ids, values))[::-1]]


# ---- runs of queries: ids and grades of a test collection ------------------------------------------------------


def query_metrics(qrels: Qrels, run: Run, names: Sequence[str], relevant_from: float = 1) -> PerQuery:
    """The value of every metric for every query that has a relevant document, in the order of `qrels`.

    Of a document that is not judged the grade is 0; a query without a ranked document has 0 in all.
    """
    measured = [query for query in qrels if is_relevant(list(qrels[query].values()), relevant_from).any()]
    highest = max((grade for query in qrels for grade in qrels[query].values()), default=0)
    per_query: PerQuery = {name: {} for name in names}
    for query in measured:
        judged = qrels[query]
        grades = [judged.get(document, 0) for document in trec_order(run.get(query, {}))]
        ranking = Ranking(_array(grades), _array(list(judged.values())), relevant_from, max(highest, 0))
        for name in names:
            per_query[name][query] = metric_value(name, ranking)
    return per_query


def means(per_query: PerQuery) -> dict[str, float]:
    """The mean of each metric over its queries; nan over none."""
    return {name: _mean(list(values.values())) for name, values in per_query.items()}


def run_metrics(qrels: Qrels, run: Run, names: Sequence[str], relevant_from: float = 1) -> dict[str, float]:
    """Means over the queries that have a relevant document."""
    return means(query_metrics(qrels, run, names, relevant_from))


def perfect_run(qrels: Qrels, candidates: Run) -> dict[str, dict[str, float]]:
    """The candidates in the best order there is: what no reranker of them can surpass."""
    return {
        query: {document: float(qrels[query].get(document, 0)) for document in documents}
        for query, documents in candidates.items()
    }


# ---- groups: scores and labels of the training and validation data ----------------------------------------------


def rank_group(scores: ArrayLike, labels: ArrayLike, relevant_from: float = 1.0, highest: float = 1.0) -> Ranking:
    """One group, of which the documents given are all that is known. scores, labels: [documents]."""
    scores, labels = np.asarray(scores, dtype=np.float32), _array(labels)
    return Ranking(labels[np.lexsort((np.arange(len(scores)), scores))[::-1]], labels, relevant_from, highest)


def group_metrics(
    scores: Sequence[np.ndarray],
    labels: Sequence[np.ndarray],
    relevant_from: float = 1.0,
    names: Sequence[str] = LOGGED_METRICS,
) -> dict[str, float]:
    """Means over groups; scores[i] and labels[i] are the scores and labels, [documents], of group i.

    Returns each metric's mean over the groups with a relevant document, nan if there is none; "queries" and
    "queries_without_relevant", the numbers of groups in and left out of those means; and "pair_accuracy", the share of
    document pairs with different labels that the scores order rightly, ties half, over all such pairs of all groups,
    also of groups without a relevant document; nan if there is none.
    Raises ValueError naming the group where a score is not finite or lengths differ.
    """
    for group, (s, y) in enumerate(zip(scores, labels, strict=True)):
        if np.shape(s) != np.shape(y) or not np.isfinite(s).all():
            raise ValueError(f"group {group}: expected a finite score for each of {np.size(y)} labels, found {s!s:.99}")
    highest = max((float(np.max(group)) for group in labels if np.size(group)), default=0.0)
    rankings = [rank_group(s, y, relevant_from, max(highest, 0.0)) for s, y in zip(scores, labels, strict=True)]
    measured = [ranking for ranking in rankings if ranking.num_relevant]
    return {
        **{name: _mean([metric_value(name, ranking) for ranking in measured]) for name in names},
        "pair_accuracy": _pair_accuracy(scores, labels),
        "queries": float(len(measured)),
        "queries_without_relevant": float(len(rankings) - len(measured)),
    }


def _pair_accuracy(scores: Sequence[np.ndarray], labels: Sequence[np.ndarray]) -> float:
    """Memory is documents^2 of the largest group."""
    right, pairs = 0.0, 0
    for s, y in zip(scores, labels, strict=True):
        s, y = np.asarray(s, dtype=np.float32), _array(y)
        ordered = y[:, None] < y[None, :]
        right += float((ordered & (s[:, None] < s[None, :])).sum() + 0.5 * (ordered & (s[:, None] == s[None, :])).sum())
        pairs += int(ordered.sum())
    return right / pairs if pairs else float("nan")


def _array(values: ArrayLike) -> np.ndarray:
    return np.asarray(values, dtype=np.float32)


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")
