"""Scores of several teachers as those of one, in which each has an equal say."""

import numpy as np


def average_teachers(scores: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """One score for each document: float32 [documents].

    scores: [documents, teachers], logits on any scales; those of a query are from its start to the next one's. starts:
    int [queries], ascending from 0. Each teacher's scores are divided by a temperature that gives its softmax over a
    query's documents the mean entropy of the first teacher's; then their mean is taken, which averages
    log-probabilities. A mean of plain logits would follow the teacher with the largest scale. Where a score is NaN the
    mean is, and its query has no part in the entropies. Raises ValueError for a teacher whose scores of a query are
    always equal.
    """
    scores = scores.astype(np.float64)
    whole = np.logical_and.reduceat(np.isfinite(scores).all(axis=1), starts)
    sizes = np.diff(starts, append=len(scores))
    rated, sizes = scores[np.repeat(whole, sizes)], sizes[whole]
    if not len(sizes):
        return scores.mean(axis=1).astype(np.float32)
    wanted = _mean_entropy(rated[:, 0], sizes, 1.0)
    temperatures = [1.0, *(_temperature(column, sizes, wanted, 2 + i) for i, column in enumerate(rated.T[1:]))]
    return (scores / temperatures).mean(axis=1).astype(np.float32)


def _temperature(scores: np.ndarray, sizes: np.ndarray, wanted: float, teacher: int) -> float:
    """By bisection of log T: the entropy grows with it."""
    low, high = -20.0, 20.0
    for _ in range(60):
        middle = (low + high) / 2
        if _mean_entropy(scores, sizes, np.exp(middle)) < wanted:
            low = middle
        else:
            high = middle
    if not np.isclose(_mean_entropy(scores, sizes, np.exp(low)), wanted, rtol=1e-3, atol=1e-6):
        raise ValueError(
            f"teacher {teacher}: no temperature gives its scores the first teacher's mean entropy of {wanted:.4g}; "
            "leave out a teacher whose scores do not tell the documents of a query apart"
        )
    return float(np.exp(low))


def _mean_entropy(scores: np.ndarray, sizes: np.ndarray, temperature: float) -> float:
    """Of the softmax over the documents of a query, in nats; the mean over queries. sizes: documents of each."""
    starts = sizes.cumsum() - sizes
    logits = scores / temperature
    logits = logits - np.repeat(np.maximum.reduceat(logits, starts), sizes)
    log_p = logits - np.repeat(np.log(np.add.reduceat(np.exp(logits), starts)), sizes)
    return float(-np.add.reduceat(np.exp(log_p) * log_p, starts).mean())
