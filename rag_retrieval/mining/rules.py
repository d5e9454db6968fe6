"""Which candidates of a query become its negatives, and why each of the others does not.

A candidate that nobody judged may be relevant. The rank window, the margins and `max_score` leave such candidates
out; each is a rule of thumb, and the summary counts what each one took.
"""

import hashlib
from collections import Counter
from dataclasses import dataclass

import numpy as np

from rag_retrieval.data.corpus import Corpus, text_hash
from rag_retrieval.mining.queries import Query
from rag_retrieval.retrieval.candidates import Candidates

REASONS = {
    "before_window": "ranked before first_rank",
    "positive": "a positive of the query",
    "identical_id": "the document with the id of the query",
    "positive_text": "the text of a positive",
    "query_text": "the text of the query",
    "no_text": "no text",
    "repeated_text": "the text of a better candidate",
    "margin": "score too near to the lowest positive's, or above",
    "max_score": "score above max_score",
    "not_drawn": "fit, but not needed",
}


@dataclass(frozen=True)
class Rules:
    """num_negatives: per query, at least 1. first_rank: of the window, from 1; its end is the list's end.

    absolute_margin, relative_margin: how far a negative stays below the lowest score of the query's positives,
    in units of the score and as a fraction of its size. max_score: of a negative. None: no such rule.
    at_random: draw among those that fit, else take the best ranked. seed: of the draw.
    """

    num_negatives: int
    first_rank: int
    absolute_margin: float | None
    relative_margin: float | None
    max_score: float | None
    at_random: bool
    seed: int


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


def below_positives(scores: np.ndarray, positive_scores: np.ndarray, rules: Rules, dropped: Counter) -> np.ndarray:
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


def draw(query: Query, fit: np.ndarray, rules: Rules, dropped: Counter) -> np.ndarray:
    """At most `num_negatives` of the places `fit` (ascending), ascending.

    The draw of a query depends on the seed and its text alone: other queries, and their order, change nothing.
    """
    count = min(rules.num_negatives, len(fit))
    dropped["not_drawn"] += len(fit) - count
    if not rules.at_random:
        return fit[:count]
    digest = hashlib.blake2b(query.text.encode(), digest_size=8).digest()
    generator = np.random.default_rng([rules.seed, int.from_bytes(digest, "little")])
    return np.sort(generator.choice(fit, count, replace=False))
