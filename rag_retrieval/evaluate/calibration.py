"""Fitting a temperature and a bias to scores and judgments, and how far probabilities are from the truth.

Unjudged candidates count as irrelevant, and the share of relevant documents among the candidates enters the bias: a
calibration fitted on BM25's best 100 is too low for the best 10.
"""

from dataclasses import dataclass

import numpy as np

from rag_retrieval.data.beir import Qrels, Run
from rag_retrieval.models.calibration import Calibration, probabilities_of, sigmoid

BINS = 10
MAX_ITERATIONS = 400  # of the search; a few dozen are enough
FLAT_GRADIENT = 1e-4  # of the mean log loss, for scores of variance 1: where the search has arrived


@dataclass(frozen=True)
class ReliabilityBin:
    """Pairs whose probability lies in one tenth of [0, 1]: their mean probability, and how many are relevant."""

    mean_probability: float
    relevant_share: float
    pairs: int


def scored_pairs(run: Run, qrels: Qrels, relevant_from: int) -> tuple[np.ndarray, np.ndarray]:
    """(scores, relevance) of all candidates: [pairs], float64 and bool."""
    rows = [
        (score, qrels[query].get(document, 0) >= relevant_from)
        for query, scores in run.items()
        for document, score in scores.items()
    ]
    scores, relevant = zip(*rows, strict=True)
    return np.array(scores, dtype=np.float64), np.array(relevant, dtype=bool)


def fit_calibration(scores: np.ndarray, relevant: np.ndarray, data: str) -> Calibration:
    """The temperature and bias of least log loss. scores: [pairs], float64; relevant: [pairs], bool.

    Targets are Platt's (1999, section 2.2): (n+1)/(n+2) for n relevant pairs and 1/(m+2) for m others, so that
    scores that separate them wholly do not give a temperature of 0. Raises ValueError where no pair or every pair
    is relevant, where relevant pairs do not score higher, and where the search does not converge.
    """
    from scipy.optimize import minimize

    positive = int(relevant.sum())
    negative = len(relevant) - positive
    if not positive or not negative:
        raise ValueError(
            f"{data}: {positive} of {len(relevant)} scored pairs are relevant; calibration needs both relevant and "
            "irrelevant ones: use more queries or a greater depth."
        )
    targets = np.where(relevant, (positive + 1) / (positive + 2), 1 / (negative + 2))
    center, spread = scores.mean(), scores.std() or 1.0
    scaled = (scores - center) / spread  # else the steps of the search depend on the scale of the scores
    result = minimize(
        _loss_and_gradient, np.zeros(2), (scaled, targets), "BFGS", jac=True, options={"maxiter": MAX_ITERATIONS}
    )
    # BFGS also reports failure where rounding ends its last step at the minimum
    if not result.success and not np.abs(result.jac).max() < FLAT_GRADIENT:
        raise ValueError(f"{data}: no temperature and bias fit {len(scores):,} scored pairs: {result.message}")
    slope, offset = result.x[0] / spread, result.x[1] - result.x[0] * center / spread
    if slope <= 0:
        raise ValueError(f"{data}: relevant pairs do not score higher than others; train the model before calibrating.")
    return Calibration(float(1 / slope), float(offset), data, len(scores))


def _loss_and_gradient(weights: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean log loss of sigmoid(weights[0] * scores + weights[1]), which is convex, and its gradient."""
    logits = weights[0] * scores + weights[1]
    loss = np.mean(np.logaddexp(0, logits) - targets * logits)
    errors = sigmoid(logits) - targets
    return float(loss), np.array([np.mean(errors * scores), np.mean(errors)])


@dataclass(frozen=True)
class ProbabilityErrors:
    """Log loss in nats and expected calibration error of what `normalize` gives on the measured pairs, by the model's
    calibration or, without one, the sigmoid; and those of the sigmoid beside it."""

    score_type: str
    calibration: Calibration | None
    log_loss: float
    calibration_error: float
    sigmoid_log_loss: float
    sigmoid_calibration_error: float


def probability_errors(scores: np.ndarray, relevant: np.ndarray, calibration: Calibration | None) -> ProbabilityErrors:
    """scores: [pairs], float64; relevant: [pairs], bool."""
    made, plain = (probabilities_of(scores, each) for each in (calibration, None))
    errors = [error(each.values, relevant) for each in (made, plain) for error in (log_loss, calibration_error)]
    return ProbabilityErrors(made.score_type, calibration, *errors)


def log_loss(probabilities: np.ndarray, relevant: np.ndarray) -> float:
    """Mean of -ln of the probability of what is true, in nats; probabilities within 1e-12 of 0 or 1 count as that."""
    right = np.where(relevant, probabilities, 1 - probabilities)
    return float(-np.log(np.clip(right, 1e-12, 1)).mean())


def reliability(probabilities: np.ndarray, relevant: np.ndarray) -> list[ReliabilityBin]:
    """The bins that hold a pair, from low to high; a probability of 1 belongs to the last."""
    places = np.minimum((probabilities * BINS).astype(int), BINS - 1)
    bins = [places == place for place in range(BINS)]
    return [
        ReliabilityBin(float(probabilities[own].mean()), float(relevant[own].mean()), int(own.sum()))
        for own in bins
        if own.any()
    ]


def calibration_error(probabilities: np.ndarray, relevant: np.ndarray) -> float:
    """Expected calibration error in [0, 1]: mean over pairs of |mean probability - relevant share| of their bin
    (Naeini, Cooper and Hauskrecht 2015)."""
    bins = reliability(probabilities, relevant)
    return sum(abs(own.mean_probability - own.relevant_share) * own.pairs for own in bins) / len(relevant)
