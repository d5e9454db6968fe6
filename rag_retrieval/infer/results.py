"""What a reranking gives back: documents in the order of their logits, with everything that the caller gave along.

The order is always that of the logits: probabilities are equal where two high logits saturate.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np

from rag_retrieval.models.calibration import Calibration, probabilities_of
from rag_retrieval.models.inputs import check_number

if TYPE_CHECKING:
    import pandas

EMPTY_SCORE = -10_000.0  # shown for a document without text; finite, so that it can be written as JSON
ScoreType = Literal["logit", "sigmoid", "calibrated", "reciprocal_rank"]


@dataclass(frozen=True)
class RerankResult:
    """One document.

    doc_id: the id that the document brought, else its position. score: of the type that the results name; a document
    without text has EMPTY_SCORE as a logit, else 0. rank: from 1. metadata: what a dict brought beside text and id.
    document_index: position in the list as given. slice: where the best slice begins and ends in `text`, in
    characters, the end not included; None where the document was read in one piece. truncated: whether a part of query
    or document was not read.
    """

    doc_id: Any
    text: str
    score: float
    rank: int
    metadata: dict = field(default_factory=dict)
    document_index: int = 0
    slice: tuple[int, int] | None = None
    truncated: bool = False


@dataclass(frozen=True)
class RerankResults(Sequence):
    """Results of one query, best first; documents with equal logits in the order given.

    score_type: what the scores are: "logit"; with `normalize` "calibrated" (a probability, by the calibration of the
    folder) or, without a calibration, "sigmoid" (of the logit: no probability after RankNet or listwise training).
    "reciprocal_rank": 1 / rank, of a ListwiseReranker, which orders without scores.
    """

    query: str
    results: list[RerankResult]
    score_type: ScoreType
    result_type: ClassVar[type[RerankResult]] = RerankResult

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, place):
        return self.results[place]

    def top_k(self, k: int) -> list[RerankResult]:
        """The k best, or all where there are fewer. ValueError for k below 1."""
        check_number("k", k, 1, "documents")
        return self.results[:k]

    def get_score_by_docid(self, doc_id) -> float:
        """The score of the document with this id, the best where several have it. KeyError where none has."""
        for result in self.results:
            if result.doc_id == doc_id:
                return result.score
        raise KeyError(f"no document with doc_id {doc_id!r} in the results of query {self.query!r:.100}")

    def to_dict(self) -> dict:
        """`{"query", "score_type", "results"}`; each result holds the fields of RerankResult."""
        return asdict(self)

    def to_json(self) -> str:
        """TypeError where ids or metadata hold what JSON cannot; ValueError for NaN or infinity in them."""
        try:
            return json.dumps(self.to_dict(), ensure_ascii=False, allow_nan=False)
        except ValueError as error:
            raise ValueError(f"{error}: an id or the metadata of a document hold it; put None in its place") from error

    def to_pandas(self) -> "pandas.DataFrame":
        """One row for each document, in the order of rank. ImportError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.to_dict()["results"], columns=[of.name for of in fields(self.result_type)])


def best_first(logits: np.ndarray) -> np.ndarray:
    """Positions by falling logit, equal ones in the order given: [documents], int."""
    return np.argsort(-logits, kind="stable")


def shown_scores(
    logits: np.ndarray, calibration: Calibration | None, normalize: bool
) -> tuple[np.ndarray, ScoreType]:
    """What is shown for logits, float32 and -inf for a document without text, and what it is."""
    if not normalize:
        return np.where(np.isneginf(logits), np.float32(EMPTY_SCORE), logits), "logit"
    made = probabilities_of(logits, calibration)
    return made.values, made.score_type
