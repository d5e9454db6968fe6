"""How far the scores of an exported model are from those of the model it was made from, and how far they may be.

What a reader would get wrong: int8 is judged by the order of documents, not by the size of differences. Its scores are
off by a tenth or more and still rank alike; float32 has no such excuse.
"""

from dataclasses import dataclass

import numpy as np

from rag_retrieval.core.command import CommandFailure
from rag_retrieval.data.beir import Qrels, Run

FLOAT32_LIMIT = 1e-4  # largest difference of a score, relative where scores exceed 1
LEAST_CORRELATION = 0.98  # of int8: Spearman's, over all pairs
LARGEST_LOSS = 0.01  # of int8: nDCG@10
MEASURE = "ndcg@10"


class DifferenceError(CommandFailure):
    """The exported model does not score as the model it was made from."""


@dataclass(frozen=True)
class Verification:
    """pairs: number compared. shortest, longest: tokens. max_difference: of scores. rank_correlation: Spearman's, over
    all pairs. data, queries, ndcg_before, ndcg_after: nDCG@10 of model and export, None without data."""

    pairs: int
    shortest: int
    longest: int
    max_difference: float
    rank_correlation: float
    data: str | None = None
    queries: int | None = None
    ndcg_before: float | None = None
    ndcg_after: float | None = None

    def describe(self) -> str:
        text = (
            f"{self.pairs:,} pairs of {self.shortest} to {self.longest} tokens: largest difference "
            f"{self.max_difference:.1e}, rank correlation {self.rank_correlation:.4f}"
        )
        if self.data is not None:
            change = self.ndcg_after - self.ndcg_before
            text += (
                f"; nDCG@10 on {self.data} ({self.queries} queries) {self.ndcg_before:.4f} before, "
                f"{self.ndcg_after:.4f} after ({change:+.4f})"
            )
        return text


def check_float32(expected: np.ndarray, found: np.ndarray) -> None:
    """Raises DifferenceError beyond FLOAT32_LIMIT, and for a score that is not finite."""
    allowed = FLOAT32_LIMIT * np.maximum(1.0, np.abs(expected))
    wrong = np.flatnonzero(~(np.abs(expected - found) <= allowed))
    if wrong.size:
        place = wrong[np.argmax(np.abs(expected - found)[wrong])]
        raise DifferenceError(
            f"the ONNX graph does not compute what the model computes: {wrong.size} of {expected.size} scores differ "
            f"by more than {FLOAT32_LIMIT}, such as {found[place]:.6f} where the model gives {expected[place]:.6f}; "
            "nothing was written. Exporting this family does not work with the installed torch"
        )


def check_int8(verification: Verification, force: bool) -> list[str]:
    """What is beyond the limits of int8, in words. Raises DifferenceError where there is something, without `force`."""
    problems = []
    if not verification.rank_correlation >= LEAST_CORRELATION:
        problems.append(f"rank correlation {verification.rank_correlation:.4f} is below {LEAST_CORRELATION}")
    if verification.data is not None and not verification.ndcg_before - verification.ndcg_after <= LARGEST_LOSS:
        loss = verification.ndcg_before - verification.ndcg_after
        problems.append(f"nDCG@10 on {verification.data} falls by {loss:.4f}, more than {LARGEST_LOSS}")
    if problems and not force:
        raise DifferenceError(
            f"int8 changes this model too much: {' and '.join(problems)}; nothing was written. Leave --quantize out, "
            "or keep it all the same with --force"
        )
    return problems


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's coefficient of two arrays of equal length, in [-1, 1]: Pearson's of the ranks, equal values sharing
    their mean rank. nan where all values of one are equal."""
    one, other = (ranks - ranks.mean() for ranks in (mean_ranks(first), mean_ranks(second)))
    spread = np.sqrt((one**2).sum() * (other**2).sum())
    return float((one * other).sum() / spread) if spread else float("nan")


def mean_ranks(values: np.ndarray) -> np.ndarray:
    """[values], float64, from 1."""
    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(count)
    return (last - (count - 1) / 2)[place]


def ndcg_of(qrels: Qrels, run: Run) -> float:
    from rag_retrieval.evaluate.measures import measure

    return measure(qrels, run, (MEASURE,))[MEASURE]
