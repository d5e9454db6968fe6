"""Ranking metrics over groups of documents, as trec_eval defines them, plus the accuracy of pair order.

What a reader would get wrong: documents with equal scores are ordered *against* the model, the lower label
first. Files often list the positive first, so a stable sort would give a model that scores every pair alike a
perfect nDCG. trec_eval breaks ties by document name, so figures agree with it exactly only without ties.

A group is all that is known of its query: the ideal ranking and the number of relevant documents come from
the documents given. Relevant documents that a first stage did not retrieve must be in the group to count.
"""

import numpy as np
from numpy.typing import ArrayLike


def rank_metrics(
    scores: list[np.ndarray], labels: list[np.ndarray], relevant_from: float = 1.0, k: int = 10
) -> dict[str, float]:
    """Means over groups; scores[i] and labels[i] are the scores and labels, [documents], of group i.

    relevant_from: the smallest label of a relevant document, for MRR and MAP; nDCG takes the label as gain.
    k: the depth of nDCG and MRR, in documents; MAP goes to the end of the group.

    Returns "ndcg@k", "mrr@k" and "map", means over the groups with a relevant document, nan if there is none;
    "queries" and "queries_without_relevant", the numbers of groups in and left out of those means; and
    "pair_accuracy", the share of document pairs with different labels that the scores order rightly, ties
    half, over all such pairs of all groups, also of groups without a relevant document; nan if there is none.
    Raises ValueError naming the group when a score is not finite or the lengths differ.
    """
    _check(scores, labels)
    groups = list(zip(scores, labels, strict=True))
    measured = [(s, y) for s, y in groups if _relevant(y, relevant_from).any()]
    return {
        f"ndcg@{k}": _mean([ndcg(s, y, k) for s, y in measured]),
        f"mrr@{k}": _mean([reciprocal_rank(s, y, relevant_from, k) for s, y in measured]),
        "map": _mean([average_precision(s, y, relevant_from) for s, y in measured]),
        "pair_accuracy": _pair_accuracy(groups),
        "queries": float(len(measured)),
        "queries_without_relevant": float(len(groups) - len(measured)),
    }


def ndcg(scores: ArrayLike, labels: ArrayLike, k: int = 10) -> float:
    """nDCG@k of one query in [0, 1]: gain = label (a negative label counts 0), discount 1 / log2(rank + 1).

    Järvelin and Kekäläinen (2002) with trec_eval's linear gain. The ideal ranking is over all documents of
    the group. 0.0 when no label is above 0.
    """
    gains = np.maximum(_labels_by_rank(scores, labels), 0.0).astype(np.float64)
    ideal = _dcg(np.sort(gains)[::-1], k)
    return _dcg(gains, k) / ideal if ideal > 0 else 0.0


def reciprocal_rank(scores: ArrayLike, labels: ArrayLike, relevant_from: float = 1.0, k: int = 10) -> float:
    """1 / rank of the first relevant document of one query; 0.0 when none is among the first k."""
    hits = np.flatnonzero(_relevant(_labels_by_rank(scores, labels), relevant_from)[:k])
    return 1.0 / (int(hits[0]) + 1) if hits.size else 0.0


def average_precision(scores: ArrayLike, labels: ArrayLike, relevant_from: float = 1.0) -> float:
    """Mean of the precision at the rank of each relevant document of one query; 0.0 when there is none."""
    ranks = np.flatnonzero(_relevant(_labels_by_rank(scores, labels), relevant_from)) + 1
    return float(np.mean(np.arange(1, ranks.size + 1) / ranks)) if ranks.size else 0.0


def _labels_by_rank(scores: ArrayLike, labels: ArrayLike) -> np.ndarray:
    """Labels from the first rank to the last, float32; among equal scores the lower label first."""
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float32)
    return labels[np.lexsort((labels, -scores))]


def _relevant(labels: ArrayLike, relevant_from: float) -> np.ndarray:
    # Both in float32, as labels are from file to loss: 0.7 in float32 is below 0.7 in float64.
    return np.asarray(labels, dtype=np.float32) >= np.float32(relevant_from)


def _dcg(gains: np.ndarray, k: int) -> float:
    top = gains[:k]
    return float(np.sum(top / np.log2(np.arange(2, top.size + 2))))


def _pair_accuracy(groups: list[tuple[np.ndarray, np.ndarray]]) -> float:
    counts = [_pair_order(scores, labels) for scores, labels in groups]
    pairs = sum(pairs for _, pairs in counts)
    return sum(right for right, _ in counts) / pairs if pairs else float("nan")


def _pair_order(scores: ArrayLike, labels: ArrayLike) -> tuple[float, int]:
    """How many pairs of one group the scores order rightly (ties half), and how many have different labels.

    Memory is documents^2.
    """
    scores, labels = np.asarray(scores, dtype=np.float64), np.asarray(labels, dtype=np.float32)
    ordered = labels[:, None] < labels[None, :]
    right = (scores[:, None] < scores[None, :]) & ordered
    tied = (scores[:, None] == scores[None, :]) & ordered
    return float(right.sum() + 0.5 * tied.sum()), int(ordered.sum())


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


def _check(scores: list[np.ndarray], labels: list[np.ndarray]) -> None:
    if len(scores) != len(labels):
        raise ValueError(
            f"{len(scores)} groups of scores but {len(labels)} of labels; give one of each per query."
        )
    for group, (s, y) in enumerate(zip(scores, labels, strict=True)):
        if np.shape(s) != np.shape(y):
            raise ValueError(
                f"group {group} has scores of shape {list(np.shape(s))} but labels of shape "
                f"{list(np.shape(y))}; give one score per label."
            )
        bad = np.flatnonzero(~np.isfinite(s))
        if bad.size:
            raise ValueError(
                f"group {group} has {bad.size} of {np.size(s)} scores that are not finite, the first "
                f"({np.asarray(s)[bad[0]]}) at document {bad[0]}; scores must be finite numbers to be ranked."
            )
