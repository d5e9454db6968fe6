"""What the server needs of a reranker: texts to pairs, the pairs' scores to the documents', to what clients are shown.

What a reader would get wrong: `encode` is called from several threads at once, `score` from one alone. A document
without text is not read by the model: it gets the lowest score, as from `Reranker`.
"""

from dataclasses import dataclass

import numpy as np

from rag_retrieval.infer.backend import Backend
from rag_retrieval.infer.long_documents import EncodedDocument, PassageEncoder, document_tokens
from rag_retrieval.infer.results import shown_scores
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.serve.refusal import Refusal
from rag_retrieval.serve.rerank_request import RerankRequest

FORWARD_PAIRS = 256  # of one forward at most; the backend bounds it by tokens besides


@dataclass(frozen=True)
class EncodedRequest:
    """documents: how many were asked for. positions: which of them have text, in order. readings: one for each of
    these. truncated: positions of those that are not read whole."""

    documents: int
    positions: list[int]
    readings: list[EncodedDocument]
    truncated: list[int]

    @property
    def pairs(self) -> list[EncodedPair]:
        return [pair for reading in self.readings for pair in reading.pairs]


@dataclass(frozen=True)
class ServedModel:
    """name: what answers call it. long_document: as for `Reranker.rerank`."""

    name: str
    backend: Backend
    long_document: str

    def encode(self, request: RerankRequest) -> EncodedRequest:
        """Raises Refusal where a text is too long and the request forbids to cut it."""
        positions = [position for position, text in enumerate(request.documents) if text.strip()]
        texts = [request.documents[position] for position in positions]
        kept = [self._beginning(text, request.max_document_tokens) for text in texts]
        reader = PassageEncoder(self.backend.pair_encoder, self.long_document)
        readings = reader.encode([(request.query, text) for text in kept])
        truncated = [
            position
            for position, text, beginning, reading in zip(positions, texts, kept, readings, strict=True)
            if reading.truncated or len(beginning) < len(text)
        ]
        if truncated and not request.truncate:
            place = f"texts[{truncated[0]}]"
            limit = f"longer, with its query, than the {reader.encoder.max_length} tokens of this model"
            raise Refusal(422, f"{place}: {limit}; shorten it, or leave truncate out")
        return EncodedRequest(len(request.documents), positions, readings, truncated)

    def _beginning(self, text: str, most_tokens: int | None) -> str:
        if most_tokens is None:
            return text
        tokens = document_tokens(self.backend.pair_encoder, text)
        return text if len(tokens.content) <= most_tokens else text[: tokens.span(0, most_tokens)[1]]

    def score(self, pairs: list[EncodedPair]) -> np.ndarray:
        """[pairs], float32, in their order. Raises ValueError for scores that are no numbers."""
        scores = self.backend.score(pairs, FORWARD_PAIRS)
        if not np.isfinite(scores).all():
            found = f"{np.count_nonzero(~np.isfinite(scores))} of {len(pairs)} scores are no numbers"
            raise ValueError(f"{self.name}: {found}; in fp16 a model may overflow: use bf16 or fp32")
        return scores

    def document_scores(self, encoded: EncodedRequest, pair_scores: np.ndarray) -> np.ndarray:
        """Logits in the order of the request: [documents]. pair_scores: of `encoded.pairs`."""
        encoder = PassageEncoder(self.backend.pair_encoder, self.long_document)
        ends = np.cumsum([len(reading.pairs) for reading in encoded.readings], dtype=int)
        of_documents = np.split(pair_scores, ends[:-1])[: len(ends)]
        scores = np.full(encoded.documents, -np.inf, np.float32)
        scores[encoded.positions] = [
            encoder.combine(reading, own).score
            for reading, own in zip(encoded.readings, of_documents, strict=True)
        ]
        return scores

    def shown(self, scores: np.ndarray, raw: bool) -> np.ndarray:
        """[documents]: logits, or values in [0, 1], calibrated where the folder has a calibration, else sigmoids."""
        return shown_scores(scores, self.backend.calibration, not raw)[0]
