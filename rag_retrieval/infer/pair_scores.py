"""Scores of pairs by dense vectors, lexical weights and token vectors, and the weighted sum of these (ensemble).

Nothing here imports torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np

from rag_retrieval.infer.encoded_texts import EncodedTexts
from rag_retrieval.losses.unified import ENSEMBLE_WEIGHTS
from rag_retrieval.models.embedding_files import EmbedderSettings
from rag_retrieval.models.inputs import check_list
from rag_retrieval.models.matching import dense_scores, lexical_score, maxsim
from rag_retrieval.models.representations import DENSE, LEXICAL, MULTI_VECTOR, REPRESENTATIONS


@dataclass(frozen=True, eq=False)
class PairScores:
    """Each [pairs], float32; None for a representation that the model does not have. ensemble: the sum of the others,
    each times its weight."""

    dense: np.ndarray | None
    lexical: np.ndarray | None
    multi_vector: np.ndarray | None
    ensemble: np.ndarray


def ensemble_weights(
    weights: Mapping[str, float] | Sequence[float] | None, representations: Sequence[str], saved: Mapping[str, float]
) -> dict[str, float]:
    """The weight of each of a model's representations. weights: by name, or of (dense, lexical, multi_vector); None for
    those that are saved with the model, else ENSEMBLE_WEIGHTS. Raises ValueError for a representation that is not
    known, or that the model lacks and whose weight is not 0, and for weights that are no finite numbers."""
    if weights is None:
        return {name: saved.get(name, ENSEMBLE_WEIGHTS[name]) for name in representations}
    if not isinstance(weights, Mapping):
        weights = check_list("weights", weights)
        if len(weights) != len(REPRESENTATIONS):
            raise ValueError(f"weights: expected one for each of {', '.join(REPRESENTATIONS)}, found {weights!r}")
        weights = dict(zip(REPRESENTATIONS, weights, strict=True))
    for name, weight in weights.items():
        if name not in REPRESENTATIONS:
            raise ValueError(f"weights: {name!r} is not known; expected {', '.join(REPRESENTATIONS)}")
        if isinstance(weight, bool) or not isinstance(weight, Real) or not np.isfinite(weight):
            raise ValueError(f"weights: that of {name} must be a number, found {weight!r}")
        if weight and name not in representations:
            raise ValueError(f"weights: this model gives {', '.join(representations)} and no {name}; give it weight 0")
    return {name: float(weights.get(name, 0)) for name in representations}


def score_encoded(
    queries: EncodedTexts,
    documents: EncodedTexts,
    places: Sequence[tuple[int, int]],
    settings: EmbedderSettings,
    weights: Mapping[str, float],
) -> PairScores:
    """places: of the query and of the document of each pair. weights: as `ensemble_weights` gives them."""
    scores: dict[str, np.ndarray | None] = dict.fromkeys(REPRESENTATIONS)
    if queries.dense is not None:
        left, right = np.array(places, int).reshape(-1, 2).T
        scores[DENSE] = dense_scores(queries.dense[left], documents.dense[right], settings.similarity)
    if queries.lexical is not None:
        of_queries, of_documents = ([part.by_id(place) for place in range(len(part))]
                                    for part in (queries.lexical, documents.lexical))  # fmt: skip
        scores[LEXICAL] = float32(lexical_score(of_queries[left], of_documents[right]) for left, right in places)
    if queries.multi_vector is not None:
        mean, left_sides, right_sides = settings.multi_vector_mean, queries.multi_vector, documents.multi_vector
        scores[MULTI_VECTOR] = float32(maxsim(left_sides[left], right_sides[right], mean) for left, right in places)
    return PairScores(**scores, ensemble=sum(np.float32(weight) * scores[name] for name, weight in weights.items()))


def float32(values) -> np.ndarray:
    return np.fromiter(values, np.float32)


def joined(parts: Sequence[PairScores]) -> PairScores:
    """Of consecutive parts of a list of pairs; at least one."""
    columns = ([getattr(part, name) for part in parts] for name in (*REPRESENTATIONS, "ensemble"))
    return PairScores(*(None if column[0] is None else np.concatenate(column) for column in columns))
