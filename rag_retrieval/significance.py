"""Whether one system ranks better than another: differences per query, their significance and their interval.

The queries are the sample. A p-value here speaks of other queries from where these came; it says nothing about another
seed or other training data.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from rag_retrieval.metrics import PerQuery

Significance = Literal["randomization", "t"]

RESAMPLES = 9999
CONFIDENCE = 0.95
BATCH_VALUES = 4_000_000  # differences held at once while resampling: 32 MB


@dataclass(frozen=True)
class Comparison:
    """Of one metric: means of two systems over the same queries, and `difference` (after - before) with its 95%
    interval [low, high] and two-sided p-value; and how many queries gained, lost and stayed."""

    metric: str
    before: float
    after: float
    difference: float
    low: float
    high: float
    p_value: float
    gained: int
    lost: int
    same: int


def compare(before: PerQuery, after: PerQuery, significance: Significance, seed: int) -> list[Comparison]:
    """A comparison for each metric. Both must hold the same metrics and queries, at least two.

    significance: "randomization" is the paired randomization test (signs of the differences, 9,999 draws, exact up
    to 13 queries; Smucker, Allan and Carterette 2007) with a percentile bootstrap interval; "t" is the paired
    t-test with its interval. Where all differences are 0 the p-value is 1.
    """
    queries = list(next(iter(before.values())))
    if len(queries) < 2:
        raise ValueError(f"a comparison needs at least two queries, found {len(queries)}")
    return [
        compare_metric(
            name,
            np.array([before[name][query] for query in queries]),
            np.array([after[name][query] for query in queries]),
            significance,
            seed,
        )
        for name in before
    ]


def compare_metric(
    name: str, before: np.ndarray, after: np.ndarray, significance: Significance, seed: int
) -> Comparison:
    """before, after: the values of the same queries, [queries]."""
    differences = after - before
    # values of equal rankings may differ by rounding, which is no gain
    differences[np.abs(differences) < 1e-12] = 0.0
    test = randomization_test if significance == "randomization" else t_test
    p_value, low, high = test(differences, seed) if differences.any() else (1.0, 0.0, 0.0)
    return Comparison(
        name,
        float(before.mean()),
        float(after.mean()),
        float(differences.mean()),
        low,
        high,
        p_value,
        int((differences > 0).sum()),
        int((differences < 0).sum()),
        int((differences == 0).sum()),
    )


def randomization_test(differences: np.ndarray, seed: int) -> tuple[float, float, float]:
    """(p-value, low, high) of differences, [queries], not all 0."""
    from scipy.stats import bootstrap, permutation_test

    generator = np.random.default_rng(seed)
    batch = max(1, BATCH_VALUES // len(differences))
    options = {"n_resamples": RESAMPLES, "vectorized": True, "batch": batch, "rng": generator}
    # with one sample, "samples" draws the sign of each difference
    test = permutation_test((differences,), np.mean, permutation_type="samples", **options)
    interval = bootstrap(
        (differences,), np.mean, confidence_level=CONFIDENCE, method="percentile", **options
    ).confidence_interval
    return float(test.pvalue), float(interval.low), float(interval.high)


def t_test(differences: np.ndarray, seed: int) -> tuple[float, float, float]:
    """(p-value, low, high) of differences, [queries], not all 0. The seed plays no part."""
    from scipy.stats import ttest_1samp

    if np.all(differences == differences[0]):  # no spread: the statistic is infinite
        return 0.0, float(differences[0]), float(differences[0])
    test = ttest_1samp(differences, 0.0)
    interval = test.confidence_interval(CONFIDENCE)
    return float(test.pvalue), float(interval.low), float(interval.high)
