"""Scores of queries and documents by dense vectors, lexical weights and token vectors, and fewer token vectors.

Everything is computed in float32. Nothing here imports torch.
"""

from collections.abc import Mapping

import numpy as np

from rag_retrieval.models.vectors import EPSILON, finish, to_float32


def dense_scores(queries: np.ndarray, documents: np.ndarray, kind: str = "cosine") -> np.ndarray:
    """The similarity of each query with the document in the same row: [pairs], float32. queries, documents: [pairs,
    dim], float32. kind: as for `vectors.similarity`."""
    if kind == "euclidean":
        return -np.linalg.norm(queries - documents, axis=1)
    if kind == "manhattan":
        return -np.abs(queries - documents).sum(axis=1)
    if kind == "cosine":
        queries, documents = finish(queries), finish(documents)
    return (queries * documents).sum(axis=1)


def lexical_score(query: Mapping, document: Mapping) -> float:
    """Sum over the common tokens of w_q w_d. query, document: the weight of each token, or of each token id."""
    small, large = sorted((query, document), key=len)
    return float(sum(weight * large[token] for token, weight in small.items() if token in large))


def maxsim(query: np.ndarray, document: np.ndarray, mean: bool = False) -> float:
    """Sum over the query's vectors of the largest product with a vector of the document (ColBERT,
    https://arxiv.org/abs/2004.12832, equation 3); with `mean` divided by their number.

    query, document: [tokens, width], float32 or float16. 0 where one of the two has no vector.
    """
    if not len(query) or not len(document):
        return 0.0
    best = (to_float32(query) @ to_float32(document).T).max(axis=1)
    return float(best.mean() if mean else best.sum())


def pool_token_vectors(vectors: np.ndarray, factor: float, protected: int = 0) -> np.ndarray:
    """Fewer vectors: those beyond the first `protected` in `tokens // factor` clusters, at least one, and the mean of
    each cluster, brought to length 1: [about tokens / factor, width], float32 (https://arxiv.org/abs/2409.14683).

    The clusters are those of Ward's method over the distances 1 - cosine, in the order of scipy's labels. vectors:
    [tokens, width], of length 1. factor: at least 1, which leaves them as they are. Equal to
    `HierarchicalTokenPooling` of sentence-transformers.
    """
    from scipy.cluster.hierarchy import fcluster, linkage
    from scipy.spatial.distance import squareform

    vectors = to_float32(vectors)
    pooled = vectors[protected:]
    clusters = max(int(len(pooled) // factor), 1)
    if clusters >= len(pooled):
        return vectors
    distances = np.clip(1 - pooled @ pooled.T, 0, 2)
    merges = linkage(squareform(distances, checks=False), method="ward")
    found, labels = np.unique(fcluster(merges, clusters, criterion="maxclust"), return_inverse=True)
    sums = np.zeros((len(found), vectors.shape[1]), np.float32)
    np.add.at(sums, labels, pooled)
    # a sum has the direction of its mean
    sums /= np.maximum(np.linalg.norm(sums, axis=1, keepdims=True), EPSILON)
    return np.concatenate((vectors[:protected], sums))
