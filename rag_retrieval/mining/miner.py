"""From queries to their negatives: search, leave out, score anew, draw.

The trap: the lowest of a query's positives sets the limit of the margins. One positive that the scores think
little of (none of its words in the query, say) can leave a query without a negative; the summary counts those.
"""

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from rag_retrieval.core.work_folder import WorkFolder
from rag_retrieval.data.corpus import Corpus
from rag_retrieval.mining.choice import Rules, below_positives, draw, fit_places
from rag_retrieval.mining.config import MiningConfig
from rag_retrieval.mining.output import Mined
from rag_retrieval.mining.queries import Query
from rag_retrieval.retrieval.candidates import Candidates
from rag_retrieval.retrieval.index import SearchOptions, make_search


class Miner:
    """Built once for a run: loads the models, and builds what the work folder lacks."""

    def __init__(self, config: MiningConfig, corpus: Corpus, work: WorkFolder):
        self.config, self.corpus, self.depth = config, corpus, config.last_rank
        self.rules = Rules(
            config.num_negatives,
            config.first_rank,
            config.absolute_margin,
            config.relative_margin,
            config.max_score,
            config.sampling == "random",
            config.seed,
        )
        device = device_of(config)
        self.reranker = None
        if config.reranker is not None:
            from rag_retrieval.mining.reranking import open_reranker

            self.reranker = open_reranker(config, device)
        self.search = make_search(search_options(config), corpus, work, device)

    def mine(self, queries: Sequence[Query]) -> Iterator[Mined]:
        """One for each query, in order; the search is done for all at once before the first."""
        texts, positives = [query.text for query in queries], [query.positives for query in queries]
        for query, candidates in zip(queries, self.search.search(texts, positives, self.depth), strict=True):
            yield self._mine(query, candidates)

    def _mine(self, query: Query, candidates: Candidates) -> Mined:
        dropped = Counter()
        fit = np.array(fit_places(query, candidates, self.corpus, self.rules.first_rank, dropped), np.int64)
        rows = candidates.rows[fit]
        scores, positive_scores = candidates.scores[fit], candidates.judged_scores
        if self.reranker is not None:
            from rag_retrieval.mining.reranking import rerank

            scores, positive_scores = rerank(self.reranker, query, rows, self.corpus, self.config)
        kept = np.flatnonzero(below_positives(scores, positive_scores, self.rules, dropped))
        kept = draw(query, kept, self.rules, dropped)
        return Mined(
            rows[kept].tolist(),
            _rounded(scores[kept]),
            _rounded(positive_scores),
            len(candidates.rows),
            {reason: count for reason, count in dropped.items() if count},
        )


def search_options(config: MiningConfig) -> SearchOptions:
    if config.candidates == "bm25":
        return SearchOptions("bm25", language=config.language)
    from rag_retrieval.retrieval.encoder import EncoderOptions

    encoder = EncoderOptions(
        config.dense_model,
        config.pooling,
        config.query_prefix,
        config.document_prefix,
        config.dense_max_len,
        config.dense_batch_size,
        config.similarity,
    )
    options = SearchOptions(config.candidates, encoder, config.vector_dtype, config.faiss_index, config.seed)
    return options if config.candidates == "dense" else replace(options, language=config.language)


def _rounded(scores: np.ndarray) -> list[float]:
    """Six decimals: more than float16 vectors or a reranker give, and lines stay readable."""
    return [round(score, 6) for score in scores.tolist()]


def device_of(config: MiningConfig) -> str:
    """The one named, or else an accelerator if there is one. Without a model to run, torch is not even imported.

    Raises ValueError for a device that this machine lacks.
    """
    if config.candidates == "bm25" and config.reranker is None:
        return "cpu"
    from rag_retrieval.models.devices import choose_device

    return str(choose_device(config.device))
