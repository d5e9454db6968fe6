"""From texts to scores, whatever the backend: slices of all documents scored together.

A chunk is bounded by its characters too, since a document may be a book; its slices are not, so that one plan of
forwards holds the slices of many documents.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rag_retrieval.infer.backend import Backend
from rag_retrieval.infer.slices import Reader, Reading
from rag_retrieval.models.text_scoring import Pairs, score_texts


@dataclass(frozen=True)
class ScoredPair:
    """score: the logit. span: of the best slice, in characters of the document; None for all of it."""

    score: float
    span: tuple[int, int] | None
    truncated: bool


def score_pairs(backend: Backend, reader: Reader, pairs: Pairs, batch_size: int) -> list[ScoredPair]:
    """In the order given. Raises ValueError for a score that is no number."""

    def score(readings: Sequence[Reading]) -> list[ScoredPair]:
        return score_readings(backend, reader.long_document, readings, batch_size)

    return score_texts(pairs, reader.read, score)


def score_readings(
    backend: Backend, long_document: str, readings: Sequence[Reading], batch_size: int
) -> list[ScoredPair]:
    scores = backend.score([part.pair for reading in readings for part in reading.slices], batch_size)
    if not np.isfinite(scores).all():
        raise ValueError(
            f"the model gave the score {scores[~np.isfinite(scores)][0]}, which is no number; in fp16 a model may "
            "overflow: use bf16 or fp32"
        )
    ends = np.cumsum([len(reading.slices) for reading in readings])
    return [
        combine(long_document, reading, own) for reading, own in zip(readings, np.split(scores, ends[:-1]), strict=True)
    ]


def combine(long_document: str, reading: Reading, scores: np.ndarray) -> ScoredPair:
    """scores: [slices]. The first of equal slices counts as the best."""
    best = int(scores.argmax())
    score = scores.mean(dtype=np.float64) if long_document == "mean_slice" else scores[best]
    return ScoredPair(float(score), reading.slices[best].span, reading.truncated)
