"""What each representation of a model finds in a collection, and their ensemble: exact scores of every query and
document, in blocks of queries.
"""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from rag_retrieval.data.collection import Collection
from rag_retrieval.losses.embedding import ENSEMBLE, Objective
from rag_retrieval.losses.step_gradients import texts_of
from rag_retrieval.metrics import Run
from rag_retrieval.models.nearest import best_columns, nearest
from rag_retrieval.models.representations import DENSE
from rag_retrieval.models.vectors import finish
from rag_retrieval.train.embedding.text_outputs import Outputs, on_device, step_outputs

BLOCK_ELEMENTS = 1 << 22  # values that the largest matrix of a block of queries has


class TextScores:
    """Scores of queries and documents as the objective takes them: by representation, and of their `ENSEMBLE` where
    there are several."""

    def __init__(self, objective: Objective, queries: Outputs, documents: Outputs):
        self.weights = objective.ensemble_weights if len(queries) > 1 else {}
        whole = replace(objective, widths=None, width_weights=None)
        self.queries, self.documents = (texts_of(whole, step_outputs(each)) for each in (queries, documents))
        self.device = next(iter(queries.values())).values.device

    @torch.no_grad()
    def blocks(self) -> Iterator[dict[str, Tensor]]:
        """Of all documents, for some queries after the other: float32 [some queries, documents]."""
        pairs = [(own, self.documents[name]) for name, own in self.queries.items()]
        number = len(pairs[0][0])
        size = max(1, BLOCK_ELEMENTS // max(own.row_elements(others, 0) for own, others in pairs))
        for start in range(0, number, size):
            rows = torch.arange(start, min(start + size, number), device=self.device)
            scores = {name: own.against(rows, self.documents[name])[-1] for name, own in self.queries.items()}
            yield self._with_ensemble(scores)

    @torch.no_grad()
    def of_pairs(self, queries: Tensor, documents: Tensor) -> dict[str, Tensor]:
        """queries: [n], places. documents: [n, k], of each. float32 [n, k]."""
        queries, documents = queries.to(self.device), documents.to(self.device)
        sides = self.queries.items()
        scores = {name: own.with_own(queries, self.documents[name], documents)[-1] for name, own in sides}
        return self._with_ensemble(scores)

    def _with_ensemble(self, scores: dict[str, Tensor]) -> dict[str, Tensor]:
        if not self.weights:
            return scores
        return scores | {ENSEMBLE: sum(weight * scores[name] for name, weight in self.weights.items())}


def rankings(
    collection: Collection,
    objective: Objective,
    queries: Outputs,
    documents: Outputs,
    depth: int,
    device: torch.device | str = "cpu",
) -> Mapping[str, Run]:
    """The best `depth` documents of each query in the corpus, or all of its pool: by representation, and by the
    `ENSEMBLE` of several. Of equal scores the greater id ranks first."""
    if list(queries) == [DENSE]:
        vectors = (finish(side[DENSE].values.numpy(), normalize=objective.normalize) for side in (queries, documents))
        return {DENSE: ranked(collection, *vectors, depth, device)}
    scores = TextScores(objective, on_device(queries, device), on_device(documents, device))
    ids = list(collection.documents)
    if collection.pool is not None:
        return in_pools(collection, scores)
    names = iter(collection.queries)
    runs: dict[str, Run] = {}
    for block in scores.blocks():
        some = [next(names) for _ in next(iter(block.values()))]
        for name, of_queries in block.items():
            found = best_columns(of_queries.flip(1), depth)  # of equal ones the lower column
            runs.setdefault(name, {}).update(_run(some, ids, *found))
    return runs


def in_pools(collection: Collection, scores: TextScores) -> Mapping[str, Run]:
    places = {document: place for place, document in enumerate(collection.documents)}
    runs: dict[str, Run] = {}
    for number, query in enumerate(collection.queries):
        candidates = collection.pool.get(query, [])
        own = torch.tensor([[places[document] for document in candidates]], dtype=torch.int64)
        for name, values in scores.of_pairs(torch.tensor([number]), own).items():
            runs.setdefault(name, {})[query] = dict(zip(candidates, values[0].tolist(), strict=True))
    return runs


def ranked(
    collection: Collection, queries: np.ndarray, documents: np.ndarray, depth: int, device: torch.device | str = "cpu"
) -> Run:
    """By the products of vectors: float32 [queries, dim] and [documents, dim]. As `rankings`."""
    if collection.pool is not None:
        return in_pool(collection, queries, documents)
    found = nearest(queries, documents[::-1], depth, device)
    return _run(list(collection.queries), list(collection.documents), *found)


def in_pool(collection: Collection, queries: np.ndarray, documents: np.ndarray) -> Run:
    rows = {document: row for row, document in enumerate(collection.documents)}
    run = {}
    for query, vector in zip(collection.queries, queries, strict=True):
        candidates = collection.pool.get(query, [])
        scores = documents[[rows[document] for document in candidates]] @ vector
        run[query] = dict(zip(candidates, scores.tolist(), strict=True))
    return run


def _run(queries: list[str], documents: list[str], rows: np.ndarray, scores: np.ndarray) -> Run:
    """rows: counted from the last document."""
    return {
        query: {documents[-1 - row]: score for row, score in zip(*found, strict=True)}
        for query, *found in zip(queries, rows.tolist(), scores.tolist(), strict=True)
    }
