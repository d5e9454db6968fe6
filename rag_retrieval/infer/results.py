"""What a reranking gives back: documents in the order of their scores, with everything the caller gave along.

What a reader would get wrong: `doc_id` is the caller's own id where a document brought one, and else its position in
the list as given; the position itself is always `document_index`.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np

from rag_retrieval.infer.documents import check_number

if TYPE_CHECKING:
    import pandas

EMPTY_SCORE = -10_000.0  # of a document without text; finite, so that it can be written as JSON
EMPTY_PROBABILITY = 0.0


@dataclass(frozen=True)
class RerankResult:
    """One document.

    score: the model's logit, or a value in [0, 1] with `normalize`; EMPTY_SCORE or EMPTY_PROBABILITY for a document
    without text. rank: from 1. metadata: what a dict brought beside text and id. document_index: position in the
    list as given. slice: where the best slice begins and ends in `text`, in characters, the end not included; None
    where the document was read in one piece. truncated: whether a part of query or document was not read.
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
    """Results of one query, best first; documents with equal scores in the order given."""

    query: str
    results: list[RerankResult]

    def __len__(self) -> int:
        return len(self.results)

    def __getitem__(self, place):
        return self.results[place]

    def __iter__(self) -> Iterator[RerankResult]:
        return iter(self.results)

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
        return {"query": self.query, "results": [asdict(result) for result in self.results]}

    def to_json(self) -> str:
        """TypeError where ids or metadata hold what JSON cannot."""
        return json.dumps(self.to_dict(), ensure_ascii=False)

    def to_pandas(self) -> "pandas.DataFrame":
        """One row for each document, in the order of rank. ImportError without pandas."""
        try:
            import pandas
        except ImportError as error:
            raise ImportError("to_pandas needs pandas: pip install pandas") from error
        return pandas.DataFrame(self.to_dict()["results"], columns=list(RerankResult.__dataclass_fields__))


def best_first(scores: Sequence[float]) -> np.ndarray:
    """Positions by falling score, equal scores in the order given: [scores], int."""
    return np.argsort(-np.asarray(scores), kind="stable")
