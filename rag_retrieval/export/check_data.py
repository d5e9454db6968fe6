"""The pairs that a model and its export are compared on, and their scores.

What a reader would get wrong: the model's own scores are taken before it is traced, because tracing spoils it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rag_retrieval.data.beir import Run
from rag_retrieval.evaluate.bm25 import BM25
from rag_retrieval.evaluate.ranking_data import RankingData, read_ranking_data
from rag_retrieval.export.config import ExportConfig
from rag_retrieval.export.sample_pairs import sample_pairs
from rag_retrieval.export.verification import Verification, ndcg_of, rank_correlation
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder

Score = Callable[[Sequence[EncodedPair]], np.ndarray]


@dataclass(frozen=True)
class CheckData:
    """encoded: the sample's pairs, then all candidates of the data in their order. data: None where none were given."""

    encoded: list[EncodedPair]
    samples: int
    data: RankingData | None

    def compare(self, expected: np.ndarray, found: np.ndarray) -> Verification:
        """expected, found: scores of all pairs, of the model and of its export. int, float: see Verification.

        The rank correlation is over the data's pairs alone, where there are any.
        """
        lengths = [len(pair) for pair in self.encoded]
        largest = float(np.abs(expected - found).max())
        if self.data is None:
            correlation = rank_correlation(expected, found)
            return Verification(len(lengths), min(lengths), max(lengths), largest, correlation)
        expected, found = expected[self.samples :], found[self.samples :]
        correlation = rank_correlation(expected, found)
        verification = Verification(len(lengths), min(lengths), max(lengths), largest, correlation)
        before, after = (ndcg_of(self.data.qrels, self.run_of(scores)) for scores in (expected, found))
        return replace(
            verification,
            data=self.data.name,
            queries=len(self.data.qrels),
            ndcg_before=before,
            ndcg_after=after,
        )

    def run_of(self, scores: np.ndarray) -> Run:
        """scores: of the data's pairs, in order."""
        values = iter(scores.tolist())
        return {
            query: {document: next(values) for document in documents}
            for query, documents in self.data.candidates.items()
        }


def read_check_data(config: ExportConfig, encoder: PairEncoder) -> CheckData:
    """Raises ValueError for data that cannot be read."""
    samples = sample_pairs(encoder)
    if config.data is None:
        return CheckData(encoder.encode(samples), len(samples), None)
    data = first_queries(read_ranking_data(config.data, config.split, BM25, config.depth), config.queries)
    pairs = [
        (data.queries[query], data.documents[document])
        for query, documents in data.candidates.items()
        for document in documents
    ]
    return CheckData(encoder.encode([*samples, *pairs]), len(samples), data)


def first_queries(data: RankingData, count: int) -> RankingData:
    """At most `count` judged queries, evenly from all."""
    names = list(data.qrels)
    kept = names[:: -(-len(names) // count)]
    qrels, candidates = ({query: values[query] for query in kept} for values in (data.qrels, data.candidates))
    return replace(data, qrels=qrels, candidates=candidates)
