"""From queries to their negatives: search, leave out, score with a reranker or a guide where one is given, draw.

The lowest score of a query's positives sets the limit of the margins. One positive with a low score (none of its words
in the query, say) can leave a query without a negative; the summary counts those. A reranker's scores are logits:
`max_score: 0` is a probability of one half for a model trained with BCE or MSE, and means nothing for one trained with
RankNet or listwise cross entropy, which needs a margin.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np

from rag_retrieval.data.corpus import Corpus, text_hash
from rag_retrieval.infer.backend import open_backend
from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.mining.config import MODELS, MiningConfig
from rag_retrieval.mining.output import Mined
from rag_retrieval.mining.queries import Query
from rag_retrieval.models.options import LongDocumentOptions, OpeningOptions
from rag_retrieval.retrieval.candidates import Candidates, Search

if TYPE_CHECKING:
    from rag_retrieval.infer.embedder import Embedder


class Miner:
    """Built once for a run: loads the models."""

    def __init__(self, config: MiningConfig, corpus: Corpus, search: Search):
        self.config, self.corpus, self.search, self.depth = config, corpus, search, config.last_rank
        device, self.reranker, self.guide = device_of(config), None, None
        if config.reranker is not None:
            self.reranker = open_reranker(config, device)
        if config.guide is not None:
            from rag_retrieval.infer.embedder import Embedder

            options = config.only(OpeningOptions, device)
            self.guide = Embedder(config.guide, **options.given(*OpeningOptions.model_fields))

    def mine(self, queries: Sequence[Query]) -> Iterator[Mined]:
        """One for each query, in order; the search is done for all at once before the first."""
        texts, positives = [query.text for query in queries], [query.positives for query in queries]
        found = self.search.search(texts, positives, self.depth)
        if self.guide is not None:
            found = guided(self.guide, queries, found, self.corpus)
        for query, candidates in zip(queries, found, strict=True):
            yield self._mine(query, candidates)

    def _mine(self, query: Query, candidates: Candidates) -> Mined:
        dropped = Counter()
        fit = np.array(fit_places(query, candidates, self.corpus, self.config.first_rank, dropped), np.int64)
        rows = candidates.rows[fit]
        scores, positive_scores = candidates.scores[fit], candidates.judged_scores
        if self.reranker is not None:
            scores, positive_scores = rerank(self.reranker, query, rows, self.corpus, self.config)
        kept = np.flatnonzero(below_positives(scores, positive_scores, self.config, dropped))
        kept = draw(query, kept, self.config, dropped)
        return Mined(
            rows[kept].tolist(),
            _rounded(scores[kept]),
            _rounded(positive_scores),
            len(candidates.rows),
            {reason: count for reason, count in dropped.items() if count},
        )


def open_reranker(config: MiningConfig, device: str) -> Reranker:
    """`config.reranker` on `config.devices` or, without any, on `device`. Raises ValueError as `open_backend`."""
    return Reranker.from_backend(open_backend(config.reranker, config.model_options(device)))


def rerank(
    reranker: Reranker, query: Query, rows: np.ndarray, corpus: Corpus, config: LongDocumentOptions
) -> tuple[np.ndarray, np.ndarray]:
    """(scores of the documents `rows`, scores of the query's positives), float32 logits. ValueError for one not finite.

    One call for each query: in a larger batch the last bits of a score would depend on the other queries.
    """
    documents = [corpus.text(row) for row in (*rows.tolist(), *query.positives.tolist())]
    pairs = [(query.text, document) for document in documents]
    try:
        scores = reranker.compute_score(pairs, long_document=config.long_document, overlap=config.overlap)
    except ValueError as error:
        raise ValueError(f"reranker: {reranker.backend.name}, query {query.text[:60]!r}: {error}") from error
    return scores[: len(rows)], scores[len(rows) :]


class RandomSearch:
    """Documents drawn by the seed and the query's text, each once, all with the score 0. count: of the corpus."""

    words = ""

    def __init__(self, count: int, seed: int):
        self.count, self.seed = count, seed

    def search(self, queries: Sequence[str], judged: Sequence[np.ndarray], depth: int) -> list[Candidates]:
        count, found = min(depth, self.count), []
        for text, asked in zip(queries, judged, strict=True):
            rows = generator(self.seed, f"candidates of {text}").choice(self.count, count, replace=False)
            found.append(Candidates(rows, np.zeros(count, np.float32), np.zeros(len(asked), np.float32)))
        return found


def guided(
    guide: "Embedder", queries: Sequence[Query], found: Sequence[Candidates], corpus: Corpus
) -> Iterator[Candidates]:
    """The same candidates in their order, with similarities of the guide for scores; a document is encoded once."""
    asked = [np.concatenate([each.rows, query.positives]) for query, each in zip(queries, found, strict=True)]
    rows = np.unique(np.concatenate(asked))
    documents = guide.encode_documents([corpus.text(row) for row in rows.tolist()])
    vectors = guide.encode_queries([query.text for query in queries])
    for vector, each, of_query in zip(vectors, found, asked, strict=True):
        scores = guide.similarity(vector, documents[np.searchsorted(rows, of_query)])[0]
        yield Candidates(each.rows, scores[: len(each.rows)], scores[len(each.rows) :])


def _rounded(scores: np.ndarray) -> list[float]:
    """Six decimals: more than float16 vectors or a reranker give, and lines stay readable."""
    return [round(score, 6) for score in scores.tolist()]


def device_of(config: MiningConfig) -> str:
    """The one named, or else an accelerator if there is one. Without a model to run, torch is not even imported.

    Raises ValueError for a device that this machine lacks.
    """
    if not MODELS.applies(config):
        return "cpu"
    from rag_retrieval.models.devices import choose_device

    return str(choose_device(config.device))


# ---- the rules ------------------------------------------------------------------------------------------


def fit_places(query: Query, candidates: Candidates, corpus: Corpus, first_rank: int, dropped: Counter) -> list[int]:
    """Places in the list of the candidates in the window that are neither positives, nor the query itself, nor text
    that came before."""
    positives = set(query.positives.tolist())
    taken = {int(corpus.text_hashes[row]): "positive_text" for row in positives}
    taken.setdefault(text_hash(query.text), "query_text")
    taken.setdefault(text_hash(""), "no_text")
    dropped["before_window"] += min(first_rank - 1, len(candidates.rows))
    places = []
    for place, row in enumerate(candidates.rows[first_rank - 1 :].tolist(), first_rank - 1):
        text = int(corpus.text_hashes[row])
        if row in positives:
            dropped["positive"] += 1
        elif row in query.identical:
            dropped["identical_id"] += 1
        elif text in taken:
            dropped[taken[text]] += 1
        else:
            taken[text] = "repeated_text"
            places.append(place)
    return places


def below_positives(
    scores: np.ndarray, positive_scores: np.ndarray, rules: MiningConfig, dropped: Counter
) -> np.ndarray:
    """bool [candidates]: whether the score keeps the margins and `max_score`."""
    lowest = positive_scores.min()
    limits = []
    if rules.absolute_margin is not None:
        limits.append(lowest - rules.absolute_margin)
    if rules.relative_margin is not None:
        limits.append(lowest - rules.relative_margin * abs(lowest))
    in_margin = scores <= min(limits, default=np.inf)
    not_too_high = scores <= (np.inf if rules.max_score is None else rules.max_score)
    dropped["margin"] += int((~in_margin).sum())
    dropped["max_score"] += int((in_margin & ~not_too_high).sum())
    return in_margin & not_too_high


def draw(query: Query, fit: np.ndarray, rules: MiningConfig, dropped: Counter) -> np.ndarray:
    """At most `num_negatives` of the places `fit` (ascending), ascending.

    The draw of a query depends on the seed and its text alone: other queries, and their order, change nothing.
    """
    count = min(rules.num_negatives, len(fit))
    dropped["not_drawn"] += len(fit) - count
    if rules.sampling == "top":
        return fit[:count]
    return np.sort(generator(rules.seed, query.text).choice(fit, count, replace=False))


def generator(seed: int, text: str) -> np.random.Generator:
    digest = hashlib.blake2b(text.encode(), digest_size=8).digest()
    return np.random.default_rng([seed, int.from_bytes(digest, "little")])
