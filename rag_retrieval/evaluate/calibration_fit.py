"""Fitting a temperature and a bias to scores and judgments, and how far probabilities are from the truth.

What a reader would get wrong: unjudged candidates count as irrelevant, and the share of relevant documents among
the candidates enters the bias. A calibration fitted on BM25's best 100 is too low for the best 10.
"""

from dataclasses import dataclass

import numpy as np

from rag_retrieval.data.beir import Qrels, Run
from rag_retrieval.models.calibration import Calibration

BINS = 10


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
    is relevant, and where relevant pairs do not score higher.
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
    scaled = (scores - center) / spread  # else the steps of the search hang on the scale of the scores
    found = minimize(_loss_and_gradient, np.zeros(2), args=(scaled, targets), jac=True, method="BFGS")
    slope, offset = found.x[0] / spread, found.x[1] - found.x[0] * center / spread
    if slope <= 0:
        raise ValueError(f"{data}: relevant pairs do not score higher than others; train the model before calibrating.")
    return Calibration(float(1 / slope), float(offset), data, len(scores))


def _loss_and_gradient(weights: np.ndarray, scores: np.ndarray, targets: np.ndarray) -> tuple[float, np.ndarray]:
    """Mean log loss of sigmoid(weights[0] * scores + weights[1]), which is convex, and its gradient."""
    from scipy.special import expit

    logits = weights[0] * scores + weights[1]
    loss = np.mean(np.logaddexp(0, logits) - targets * logits)
    errors = expit(logits) - targets
    return float(loss), np.array([np.mean(errors * scores), np.mean(errors)])


def calibrated(scores: np.ndarray, calibration: Calibration | None) -> np.ndarray:
    """Probabilities of scores; the plain sigmoid without a calibration."""
    from scipy.special import expit

    return expit(scores) if calibration is None else expit(scores / calibration.temperature + calibration.bias)


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
