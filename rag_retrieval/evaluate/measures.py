"""nDCG@k, MRR@k, MAP, recall@k and P@k as trec_eval defines them, through ir-measures.

What a reader would get wrong, twice. Ties: trec_eval takes scores in float32 and orders equal ones by document
id, the greater id (as text) first, so that a model which scores all pairs alike gets neither the best nor the
worst figure. And MRR@k: asked for RR with a cutoff, ir-measures leaves trec_eval for a provider that keeps
equal scores in the order given; so RR is asked without one, and counts 0 from below 1/k.
"""

import re
from collections.abc import Sequence

import numpy as np

from rag_retrieval.data.beir import Qrels, Run

DEFAULT_MEASURES = ("ndcg@10", "mrr@10", "map", "recall@10", "recall@100", "p@10")
PATTERN = re.compile(r"(ndcg|mrr|map|recall|p)(?:@([1-9][0-9]*))?")

PerQuery = dict[str, dict[str, float]]  # measure to query id to value


def check_measures(names: Sequence[str]) -> None:
    """Raises ValueError for a name that is none of ndcg@k, mrr@k, map, recall@k, p@k."""
    for name in names:
        found = PATTERN.fullmatch(name)
        if found is None or (found[2] is None) != (found[1] == "map"):
            raise ValueError(f"found {name!r}; expected ndcg@k, mrr@k, map, recall@k or p@k, such as ndcg@10")
    if not names:
        raise ValueError("found none; expected at least one, such as ndcg@10")


def measure_queries(
    qrels: Qrels, run: Run, names: Sequence[str] = DEFAULT_MEASURES, relevant_from: int = 1
) -> PerQuery:
    """The value of every measure for every judged query, in [0, 1], queries in the order of `qrels`.

    relevant_from: the smallest grade of a relevant document, for all but nDCG, whose gains are the grades (below
    0: none). A query without a ranked document, or without a relevant one, has 0. Unjudged documents are
    irrelevant. Raises ValueError for an unknown measure.
    """
    import ir_measures

    check_measures(names)
    asked = {name: _measure(name, relevant_from) for name in names}
    found: dict = {}
    for value in ir_measures.iter_calc(list(set(asked.values())), qrels, run):
        found[value.measure, value.query_id] = float(value.value)
    return {name: {query: _cut(name, found[asked[name], query]) for query in qrels} for name in names}


def _measure(name: str, relevant_from: int):
    from ir_measures import AP, RR, P, R, nDCG

    kind, _, cutoff = name.partition("@")
    if kind == "ndcg":
        return nDCG @ int(cutoff)
    if kind in ("map", "mrr"):
        return {"map": AP, "mrr": RR}[kind](rel=relevant_from)
    return {"recall": R, "p": P}[kind](rel=relevant_from) @ int(cutoff)


def _cut(name: str, value: float) -> float:
    """0 for a reciprocal rank beyond the cutoff of mrr@k; the factor is room for rounding."""
    if name.startswith("mrr@") and value * int(name[4:]) < 0.999999:
        return 0.0
    return value


def means(per_query: PerQuery) -> dict[str, float]:
    """The mean of each measure over all judged queries."""
    return {name: float(np.mean(list(values.values()))) for name, values in per_query.items()}


def measure(qrels: Qrels, run: Run, names: Sequence[str] = ("ndcg@10", "mrr@10", "map")) -> dict[str, float]:
    """Means over all queries of `qrels`; a query without a run counts 0."""
    return means(measure_queries(qrels, run, names))


def perfect_run(qrels: Qrels, candidates: Run) -> Run:
    """The candidates in the best order there is: what no reranker of them can surpass."""
    return {
        query: {document: float(qrels[query].get(document, 0)) for document in documents}
        for query, documents in candidates.items()
    }
