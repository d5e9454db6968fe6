"""The lists of several searches as one: by reciprocal ranks, or by weighted scores (`fit_fusion` finds the weights).
The scores of a reranker and of what it read are added in the same way (`combine`).

Scores of two searches share no scale. A score after fusion orders the documents of one query, and says nothing about
relevance or about another query.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rag_retrieval.core.files import read_json, write_json
from rag_retrieval.infer.results import EMPTY_SCORE
from rag_retrieval.models.settings import model_content
from rag_retrieval.retrieval.candidates import Candidates, Search

logger = logging.getLogger(__name__)

FUSION_FILE = "fusion.json"  # in the folder of an index
RRF_K = 60  # Cormack, Clarke and Büttcher, SIGIR 2009


@dataclass(frozen=True)
class Fusion:
    """How the lists of stages become one list. A document that a list does not have gets 0 of it.

    weights: None adds 1 / (60 + rank) over the lists, ranks from 1 (reciprocal rank fusion). By stage, each in [0, 1]
    and one above 0: adds weight x (score - lowest) / (highest - lowest), where lowest and highest are those of the
    stage's list of this query, and the fraction is 1 where they are equal. A stage of weight 0 is left out.
    reranker_weight: of a reranker's scores in `combine`, in [0, 1], after a list of these weights; None: the reranker
    alone decides. reranker: the `model_content` of the only one that the weight is for; None: any.

    Raises ValueError for other weights.
    """

    weights: Mapping[str, float] | None = None
    reranker_weight: float | None = None
    reranker: str | None = None

    def __post_init__(self):
        values = list((self.weights or {"": 1.0}).values())
        if not all(map(_is_share, values)) or not any(values):
            raise ValueError(f"weights: expected numbers in [0, 1], one of them above 0; found {self.weights}")
        if self.reranker_weight is not None and not _is_share(self.reranker_weight):
            raise ValueError(f"reranker_weight: expected a number in [0, 1], found {self.reranker_weight!r}")

    @classmethod
    def read(cls, file: str | Path) -> "Fusion":
        """Raises ValueError for a file that `fit-fusion` did not write."""
        try:
            values = read_json(Path(file))
            return cls(values["weights"], values.get("reranker_weight"), values.get("reranker"))
        except (KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"{file}: expected a file that rag-retrieval fit-fusion wrote; write it again") from error

    def save(self, file: Path, fitted: Mapping[str, Any]) -> None:
        """What `read` reads. fitted: how the weights were found, as JSON values."""
        write_json(file, asdict(self) | {"fitted": fitted})

    def weight_of(self, reranker: str) -> float | None:
        """The `reranker_weight` for the reranker of this folder or name. None where there is none and, with a warning,
        where it was fitted for another one."""
        if self.reranker_weight is None or self.reranker in (None, model_content(reranker)):
            return self.reranker_weight
        logger.warning("%s: the reranker's weight was fitted for another reranker and is not used; give fit-fusion "
                       "this one", reranker)  # fmt: skip
        return None

    def used(self, stages: Sequence[str]) -> list[str]:
        """Those of the stages that play a part. ValueError where the weights are of other stages."""
        if self.weights is None:
            return list(stages)
        used = [stage for stage in stages if self.weights.get(stage)]
        needed = {stage for stage, weight in self.weights.items() if weight}
        if needed - set(used) or set(stages) - set(self.weights):
            names = f"{', '.join(self.weights)}, and searched are {', '.join(stages)}"
            raise ValueError(f"fusion: the weights are of {names}; fit them for these, or take reciprocal ranks")
        return used

    def shares(self, stage: str, candidates: Candidates) -> np.ndarray:
        """What each document of a stage's list gets of it: [candidates], float64."""
        if self.weights is None:
            return 1 / (RRF_K + 1 + np.arange(len(candidates.rows)))
        return self.weights[stage] * spread(candidates.scores)

    def fuse(self, lists: Mapping[str, Candidates], judged: np.ndarray, depth: int) -> Candidates:
        """The best `depth` documents, equal scores by row. A judged document in no list has the score 0."""
        used = {stage: lists[stage] for stage in self.used(list(lists))}
        rows = np.concatenate([candidates.rows for candidates in used.values()])
        shares = np.concatenate([self.shares(stage, candidates) for stage, candidates in used.items()])
        documents, place = np.unique(rows, return_inverse=True)
        scores = np.bincount(place, shares, len(documents)).astype(np.float32)
        judged_scores = np.array([scores[documents == row].sum() for row in judged], np.float32)
        order = np.argsort(-scores, kind="stable")[:depth]
        return Candidates(documents[order], scores[order], judged_scores)


def spread(scores: np.ndarray) -> np.ndarray:
    """The highest at 1, the lowest at 0, the others between; all at 1 where they are equal: [candidates], float64."""
    if not len(scores):
        return np.zeros(0)
    scores = scores.astype(np.float64)
    lowest, highest = scores.min(), scores.max()
    return (scores - lowest) / (highest - lowest) if highest > lowest else np.ones(len(scores))


def combine(weight: float, scores: np.ndarray, logits: np.ndarray) -> np.ndarray:
    """weight x spread(logits) + (1 - weight) x spread(scores), of one query: [candidates], float32.

    weight: of the reranker, in [0, 1]. scores: by which the candidates were found. logits: of the reranker, in the same
    order. A candidate without text (EMPTY_SCORE) plays no part and keeps its EMPTY_SCORE.
    """
    read, combined = logits > EMPTY_SCORE, np.full(len(logits), EMPTY_SCORE, np.float32)
    combined[read] = weight * spread(logits[read]) + (1 - weight) * spread(scores[read])
    return combined


def _is_share(value: Any) -> bool:
    return isinstance(value, (int, float)) and 0 <= value <= 1


class FusedSearch:
    """Every search that plays a part to the full depth, then fused. searches: by the name of their stage."""

    def __init__(self, searches: Mapping[str, Search], fusion: Fusion):
        self.searches, self.fusion = {stage: searches[stage] for stage in fusion.used(list(searches))}, fusion
        self.words = "".join(search.words for search in self.searches.values())

    def search(self, queries: Sequence[str], judged: Sequence[np.ndarray], depth: int) -> list[Candidates]:
        found = {stage: search.search(queries, judged, depth) for stage, search in self.searches.items()}
        of_query = [{stage: lists[place] for stage, lists in found.items()} for place in range(len(queries))]
        return [self.fusion.fuse(lists, rows, depth) for lists, rows in zip(of_query, judged, strict=True)]
