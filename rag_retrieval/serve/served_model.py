"""What the server needs of a reranker: texts to pairs, pairs to scores, scores to what the client is shown.

What a reader would get wrong: `encode` is called from several threads at once, `score` from one alone. A document
without text is not read by the model: it gets the lowest score, as from `Reranker`.
"""

from dataclasses import dataclass

import numpy as np

from rag_retrieval.infer.backend import Backend
from rag_retrieval.infer.results import EMPTY_PROBABILITY, EMPTY_SCORE
from rag_retrieval.models.calibration import sigmoid
from rag_retrieval.models.pair_encoding import EncodedPair, cut
from rag_retrieval.serve.refusal import Refusal
from rag_retrieval.serve.rerank_request import RerankRequest

FORWARD_PAIRS = 256  # of one forward at most; the backend bounds it by tokens besides


@dataclass(frozen=True)
class EncodedRequest:
    """positions: which documents have text, in order. pairs: one for each of these. truncated: which were cut."""

    positions: list[int]
    pairs: list[EncodedPair]
    truncated: list[int]

    @property
    def tokens(self) -> int:
        return sum(map(len, self.pairs))


@dataclass(frozen=True)
class ServedModel:
    """name: what answers call it."""

    name: str
    backend: Backend

    def encode(self, request: RerankRequest) -> EncodedRequest:
        """Texts beyond the model's length are cut. Raises Refusal where that was not wanted."""
        encoder, most = self.backend.pair_encoder, request.max_document_tokens
        positions = [position for position, text in enumerate(request.documents) if text.strip()]
        [query_ids] = encoder.query_ids([request.query])
        document_ids = encoder.document_ids([request.documents[position] for position in positions])
        pairs = [encoder.join(query_ids, self._first(most, ids)) for ids in document_ids]
        truncated = [
            position
            for position, ids, pair in zip(positions, document_ids, pairs, strict=True)
            if pair.truncated or (most is not None and len(ids) > most)
        ]
        if truncated and not request.truncate:
            limit = f"texts[{truncated[0]}]: longer than {encoder.max_length} tokens with its query"
            raise Refusal(422, f"{limit}; shorten it, or set truncate to true")
        return EncodedRequest(positions, pairs, truncated)

    def _first(self, most: int | None, document_ids: list[int]) -> list[int]:
        if most is None or len(document_ids) <= most:
            return document_ids
        end = self.backend.pair_encoder.template.document_end
        return cut(document_ids, max(most, len(end) + 1), end)

    def score(self, pairs: list[EncodedPair]) -> np.ndarray:
        """[pairs], float32, in their order. Raises ValueError for scores that are no numbers."""
        scores = self.backend.score(pairs, FORWARD_PAIRS)
        if not np.isfinite(scores).all():
            count = np.count_nonzero(~np.isfinite(scores))
            raise ValueError(f"{self.name}: {count} of {len(pairs)} scores are not finite; its weights may be damaged")
        return scores

    def document_scores(self, encoded: EncodedRequest, pair_scores: np.ndarray, documents: int) -> np.ndarray:
        """Logits in the order of the request: [documents]."""
        scores = np.full(documents, EMPTY_SCORE, np.float32)
        scores[encoded.positions] = pair_scores
        return scores

    def probabilities(self, encoded: EncodedRequest, pair_scores: np.ndarray, documents: int) -> np.ndarray:
        """[documents] in [0, 1]: calibrated where the folder has a calibration, else sigmoids."""
        calibration = self.backend.calibration
        shown = np.full(documents, EMPTY_PROBABILITY, np.float32)
        shown[encoded.positions] = sigmoid(pair_scores) if calibration is None else calibration.apply(pair_scores)
        return shown

    def warm_up_pairs(self) -> list[EncodedPair]:
        """A short pair and one of the model's length, so that first requests meet no first-time work."""
        long_text = "word " * self.backend.pair_encoder.max_length
        return self.encode(RerankRequest("query", ["document", long_text], text_shape=True)).pairs
