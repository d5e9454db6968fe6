"""Rerankers by token vectors: a query and a document are encoded apart, and their score is MaxSim.

A text that stands in several pairs of a call is computed once, so that ten documents of a query cost eleven forwards'
worth of texts, not ten pairs. Nothing here imports torch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from rag_retrieval.models.calibration import read_calibration
from rag_retrieval.models.matching import maxsim
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder, PairTemplate
from rag_retrieval.models.representations import MULTI_VECTOR
from rag_retrieval.models.text_encoding import TextEncoder

if TYPE_CHECKING:
    from rag_retrieval.infer.onnx_backend import OnnxEmbedder
    from rag_retrieval.infer.torch_backend import TorchEmbedder


@dataclass(frozen=True, eq=False)
class TextPair:
    """A query and a document, each encoded by itself."""

    query: EncodedPair
    document: EncodedPair

    @property
    def truncated(self) -> bool:
        return self.query.truncated or self.document.truncated

    def __len__(self) -> int:
        """Tokens of both."""
        return len(self.query) + len(self.document)


@dataclass(frozen=True, kw_only=True)
class TextPairEncoder(PairEncoder):
    """Encodes the two texts of a pair apart, as `texts` does. max_length: tokens of a document; a query has its own
    limit, which is at most this."""

    texts: TextEncoder

    def fits(self, query_ids: Sequence[int] | np.ndarray, document_ids: Sequence[int] | np.ndarray) -> bool:
        """Whether `join` keeps all of the document."""
        return len(document_ids) <= self.texts.budget(self.max_length)

    def room_for_slices(self, query_tokens: int) -> tuple[int, int]:
        return query_tokens, self.texts.budget(self.max_length)

    def join(self, query_ids: Sequence[int] | np.ndarray, document_ids: Sequence[int] | np.ndarray) -> TextPair:
        limit = min(self.texts.max_length_of("query"), self.max_length)
        query = self.texts.expand(self.texts.join([], query_ids, limit), limit)
        return TextPair(query, self.texts.join([], document_ids, self.max_length))

    def untruncated_lengths(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Tokens of each pair's document, special tokens included, before truncation: int [pairs]."""
        documents = self.text_ids([document for _, document in pairs], "document")
        return np.array([len(self.texts.join([], ids)) for ids in documents], int)


def text_pair_encoder(texts: TextEncoder, max_length: int) -> TextPairEncoder:
    prompts = {f"before_{kind}": texts.prompt_for(kind) for kind in ("query", "document")}
    return TextPairEncoder(
        tokenizer=texts.tokenizer,
        template=PairTemplate([], [], [], **prompts),
        max_length=max_length,
        private=texts.private,
        texts=texts,
    )


class TokenVectorBackend:
    """See `rag_retrieval.infer.backend.Backend`. Scores are sums or means over a query's vectors, as the model says."""

    model_type = MULTI_VECTOR

    def __init__(self, embedder: "TorchEmbedder | OnnxEmbedder"):
        """Raises ValueError for an embedder without token vectors."""
        own = embedder.settings.representations
        if MULTI_VECTOR not in own:
            raise ValueError(
                f"{embedder.name}: it gives {' and '.join(own)}, and an embedder ranks by token vectors; give a "
                "reranker, or open it with Embedder"
            )
        self.embedder, self.name, self.device = embedder, embedder.name, embedder.device
        self.pair_encoder = text_pair_encoder(embedder.text_encoder, embedder.text_encoder.max_length)
        self.calibration = read_calibration(self.name)

    def score(self, pairs: Sequence[TextPair], batch_size: int) -> np.ndarray:
        if not pairs:
            return np.empty(0, np.float32)
        texts = {key_of(text): text for pair in pairs for text in (pair.query, pair.document)}
        vectors = self.embedder.encode(list(texts.values()), batch_size, (MULTI_VECTOR,))[MULTI_VECTOR]
        vectors_of = dict(zip(texts, vectors, strict=True))
        mean = self.embedder.settings.multi_vector_mean
        scores = (maxsim(vectors_of[key_of(pair.query)], vectors_of[key_of(pair.document)], mean) for pair in pairs)
        return np.fromiter(scores, np.float32, len(pairs))

    def at_layer(self, layer: int) -> "TokenVectorBackend":
        raise ValueError(f"cutoff_layers: {self.name} ranks by token vectors, which are of one layer; leave it out")

    def describe(self) -> str:
        queries, documents = self.pair_encoder.texts.max_length_of("query"), self.pair_encoder.max_length
        how = self.embedder.describe()
        return f"token vectors, {queries} tokens of a query and {documents} of a document, {how}"

    def fingerprint(self) -> str:
        return self.embedder.fingerprint()

    def close(self) -> None:
        self.embedder.close()


def key_of(text: EncodedPair) -> tuple[bool, bytes]:
    return text.is_query, text.ids.tobytes()


