"""Scores of a reranker for the candidates of a query, to find those that are likely relevant themselves.

The scores are logits. `max_score: 0` is a probability of one half for a model trained with BCE or MSE, and means
nothing for one trained with RankNet or listwise cross entropy: give those a margin.
"""

import numpy as np

from rag_retrieval.data.corpus import Corpus
from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.mining.queries import Query


def rerank(
    reranker: Reranker, query: Query, rows: np.ndarray, corpus: Corpus, long_document: str, overlap: int
) -> tuple[np.ndarray, np.ndarray]:
    """(scores of the documents `rows`, scores of the query's positives), float32. ValueError for one not finite.
    long_document, overlap: of `Reranker.rerank`.

    One call for each query: in a larger batch the last bits of a score would depend on the other queries.
    """
    documents = [corpus.text(row) for row in (*rows.tolist(), *query.positives.tolist())]
    try:
        pairs = [(query.text, document) for document in documents]
        scores = reranker.compute_score(pairs, long_document=long_document, overlap=overlap)
    except ValueError as error:
        raise ValueError(f"reranker: {reranker.backend.name}, query {query.text[:60]!r}: {error}") from error
    return scores[: len(rows)], scores[len(rows) :]
