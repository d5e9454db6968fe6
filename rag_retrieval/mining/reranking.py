"""Scores of a reranker for the candidates of a query, to find those that are likely relevant themselves.

The trap: the scores are logits. `max_score: 0` is a probability of one half for a model trained with BCE or MSE,
and means nothing for one trained with RankNet or listwise cross entropy: give those a margin.
"""

import numpy as np

from rag_retrieval.data.corpus import Corpus
from rag_retrieval.mining.queries import Query
from rag_retrieval.models.cross_encoder import CrossEncoder
from rag_retrieval.models.llm_decoder import LLMDecoder
from rag_retrieval.models.load_reranker import check_trained
from rag_retrieval.models.model_files import read_settings, resolve_model_path
from rag_retrieval.models.pair_scorer import PairScorer


def load_reranker(name: str, device: str) -> PairScorer:
    """A trained reranker of either type. Raises ValueError for a model whose score head is fresh."""
    path = resolve_model_path(name)
    settings = read_settings(path)
    kind = LLMDecoder if settings is not None and settings.model_type == "llm_decoder" else CrossEncoder
    scorer = kind.from_pretrained(path)
    check_trained(name, scorer)
    scorer.eval()
    scorer.model.to(device)
    return scorer


def rerank(scorer: PairScorer, query: Query, rows: np.ndarray, corpus: Corpus) -> tuple[np.ndarray, np.ndarray]:
    """(scores of the documents `rows`, scores of the query's positives), float32. ValueError for one not finite.

    One call for each query: in a larger batch the last bits of a score would hang on the other queries.
    """
    documents = [corpus.text(row) for row in (*rows.tolist(), *query.positives.tolist())]
    scores = scorer.compute_score([(query.text, document) for document in documents], show_progress_bar=False).numpy()
    broken = np.flatnonzero(~np.isfinite(scores))
    if len(broken):  # a comparison with nan is false: it would pass for a score too near to the positive's
        found = f"gave the score {scores[broken[0]]} to the query {query.text[:60]!r}"
        raise ValueError(f"reranker: {scorer.model.name_or_path} {found}; its weights are damaged, give another")
    return scores[: len(rows)], scores[len(rows) :]
