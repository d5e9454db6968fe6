"""Scores of a reranker for the candidates of a query, to find those that are likely relevant themselves.

The scores are logits. `max_score: 0` is a probability of one half for a model trained with BCE or MSE, and means
nothing for one trained with RankNet or listwise cross entropy: give those a margin.
"""

import numpy as np

from rag_retrieval.data.corpus import Corpus
from rag_retrieval.infer.open_backend import open_backend
from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.mining.config import MiningConfig
from rag_retrieval.mining.queries import Query
from rag_retrieval.models.options import LongDocumentOptions


def open_reranker(config: MiningConfig, device: str) -> Reranker:
    """`config.reranker` on `config.devices` or, without any, on `device`. Raises ValueError as `open_backend`."""
    options = config.model_options()
    if options.devices is None:
        options = options.model_copy(update={"device": device})
    return Reranker.from_backend(open_backend(config.reranker, options))


def rerank(
    reranker: Reranker, query: Query, rows: np.ndarray, corpus: Corpus, config: LongDocumentOptions
) -> tuple[np.ndarray, np.ndarray]:
    """(scores of the documents `rows`, scores of the query's positives), float32. ValueError for one not finite.

    One call for each query: in a larger batch the last bits of a score would depend on the other queries.
    """
    documents = [corpus.text(row) for row in (*rows.tolist(), *query.positives.tolist())]
    pairs = [(query.text, document) for document in documents]
    try:
        scores = reranker.compute_score(pairs, long_document=config.long_document, overlap=config.overlap)
    except ValueError as error:
        raise ValueError(f"reranker: {reranker.backend.name}, query {query.text[:60]!r}: {error}") from error
    return scores[: len(rows)], scores[len(rows) :]
