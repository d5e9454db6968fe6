"""`Retriever`: the documents of an index that answer a query, found in stages.

    bm25, dense, lexical, multi_vector    searches of the index, each to `depth` documents
    fused       their lists as one, where there are two or more
    reranked    the list before it in the order of a Reranker's scores, where there is one
    combined    both scores added, where the fusion has a weight for this Reranker

torch is not imported for an index of words alone, and for exported models.
"""

import asyncio
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from rag_retrieval.data.corpus import Corpus
from rag_retrieval.infer.reranker import Reranker, open_reranker
from rag_retrieval.infer.results import EMPTY_SCORE, RerankResult, RerankResults, best_first, shown_scores
from rag_retrieval.models.inputs import check_flag, check_list, check_number, check_text
from rag_retrieval.models.options import LONG_DOCUMENT_DEFAULT, OVERLAP
from rag_retrieval.retrieval.candidates import Candidates
from rag_retrieval.retrieval.fusion import FUSION_FILE, Fusion, combine
from rag_retrieval.retrieval.index import Index, Opened

if TYPE_CHECKING:
    from rag_retrieval.infer.embedder import Embedder

FUSED, RERANKED, COMBINED = "fused", "reranked", "combined"  # stages after the searches
DEPTH = 100  # documents


@dataclass(frozen=True)
class SearchResult(RerankResult):
    """One document, as a RerankResult. doc_id, text, metadata: as the index has them. document_index: its row there.
    slice, truncated: of the reranking.

    score: of the last stage. scores, ranks: by stage, of those that found the document; ranks from 1.
    """

    scores: dict[str, float] = field(default_factory=dict)
    ranks: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class SearchResults(RerankResults):
    """Results of one query, best first, as RerankResults. score_type: what the scores are: as there where "reranked" is
    the last stage, else the name of the last stage."""

    results: list[SearchResult]
    score_type: str
    result_type: ClassVar[type[SearchResult]] = SearchResult


class Retriever:
    """A search over an index, perhaps with a reranker after it. Several threads may call one.

    index: a folder that `rag-retrieval index` wrote, or an open Index. reranker: a Reranker, or the folder, hub name or
    `package:NAME` of one. embedder: an open Embedder in place of the one that the index names. stages: those of the
    index to search; default all that play a part in the fusion. fusion: how several become one, and the weight of the
    reranker; default what `fit-fusion` left in the index, else reciprocal ranks. With one of several searches in
    `stages`, what it left is not taken. A weight for another reranker is not used, with a warning. depth: documents
    that each stage finds at most, and that are reranked; `top_k` where that is more. device, trust_remote_code: of
    models that are opened here. batch_size and all after it: of the reranking, as for `Reranker.rerank`.

    Raises ValueError for a folder without an index, a stage that it does not have, weights of other stages, and what
    `Reranker` refuses.
    """

    def __init__(
        self,
        index: str | os.PathLike | Index,
        *,
        reranker: str | os.PathLike | Reranker | None = None,
        embedder: "Embedder | None" = None,
        stages: Sequence[str] | None = None,
        fusion: Fusion | None = None,
        depth: int = DEPTH,
        device: str | None = None,
        trust_remote_code: bool = False,
        batch_size: int = 256,
        normalize: bool = False,
        long_document: str = LONG_DOCUMENT_DEFAULT,
        overlap: int = OVERLAP,
    ):
        check_number("depth", depth, 1, "documents")
        if not isinstance(fusion, Fusion | None):
            raise ValueError(f"fusion: expected a Fusion, found {type(fusion).__name__}; Fusion.read opens a file")
        if isinstance(index, Index) and embedder is not None:
            raise ValueError("embedder: give it to the Index, which was opened before")
        self._opened: list[Index | Reranker] = []
        self.index = index
        if not isinstance(index, Index):
            self.index = Index(index, embedder=embedder, device=device, trust_remote_code=trust_remote_code)
            self._opened.append(self.index)
        self.stages, self.fusion = self._checked_stages(stages), fusion
        if fusion is None and (len(self.stages) > 1 or len(self.index.searches) == 1):
            file = self.index.folder / FUSION_FILE
            self.fusion = Fusion.read(file) if file.is_file() else Fusion()
        if self.fusion is not None:
            used = self.fusion.used(self.stages)
            self.stages = used if stages is None else self.stages
        self.reranker = self.reranker_weight = None
        if reranker is not None:
            self.reranker = open_reranker(reranker, device=device, trust_remote_code=trust_remote_code)
            self._opened += [self.reranker] if self.reranker is not reranker else []
            self.reranker_weight = self.fusion and self.fusion.weight_of(self.reranker.backend.name)
        check_flag("normalize", normalize)
        self.depth, self.normalize = depth, normalize
        self.options = {"batch_size": batch_size, "long_document": long_document, "overlap": overlap}

    def search(self, query: str, top_k: int = 10) -> SearchResults:
        """The best `top_k` documents, fewer where fewer were found; with equal scores in the order of the stage before.

        Raises ValueError for a query that is no text.
        """
        return self._search([check_text("query", query)], top_k)[0]

    def search_many(self, queries: Sequence[str], top_k: int = 10) -> list[SearchResults]:
        """`search` for several queries, which are encoded together."""
        listed = check_list("queries", queries)
        return self._search([check_text(f"queries[{place}]", query) for place, query in enumerate(listed)], top_k)

    async def asearch(self, query: str, top_k: int = 10) -> SearchResults:
        """`search` in a thread, so that the event loop is not blocked."""
        return await asyncio.to_thread(self.search, query, top_k)

    def search_stages(self, queries: Sequence[str], depth: int | None = None) -> list[dict[str, Candidates]]:
        """For each query what every stage found, by its name, in the order in which they work; the last is the result.

        depth: in place of the Retriever's.
        """
        depth = self.depth if depth is None else depth
        return [lists for lists, *_ in self._stages(queries, depth, self.index.opened)]

    def close(self) -> None:
        """Let the models go that were opened here. Reranking then raises ValueError."""
        for opened in self._opened:
            opened.close()

    def __enter__(self) -> "Retriever":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _checked_stages(self, stages: Sequence[str] | None) -> list[str]:
        known = list(self.index.searches)
        names = known if stages is None else check_list("stages", stages)
        if not names or set(names) - set(known) or len(set(names)) < len(names):
            raise ValueError(f"stages: expected some of {', '.join(known)}, each once; found {names}")
        return names

    def _search(self, queries: list[str], top_k: int) -> list[SearchResults]:
        check_number("top_k", top_k, 1, "documents")
        opened = self.index.opened
        searched = zip(queries, self._stages(queries, max(self.depth, top_k), opened), strict=True)
        return [_results(query, *found, opened.documents, top_k) for query, found in searched]

    def _stages(
        self, queries: Sequence[str], depth: int, opened: Opened
    ) -> Iterator[tuple[dict[str, Candidates], dict[int, RerankResult], str]]:
        """For each query what the stages found, what the reranking said of each row, and the type of the last scores.
        One call of the Reranker for each: in a larger batch the last bits of a score would depend on the other
        queries."""
        nothing = np.zeros(0, np.int64)
        searches = {stage: opened.searches[stage] for stage in self.stages}
        found = {stage: one.search(queries, [nothing] * len(queries), depth) for stage, one in searches.items()}
        for place, query in enumerate(queries):
            lists, reranked = {stage: of_stage[place] for stage, of_stage in found.items()}, {}
            if len(self.stages) > 1:
                lists[FUSED] = self.fusion.fuse(lists, nothing, depth)
            last = score_type = list(lists)[-1]
            if self.reranker is not None:
                after, reranked, score_type = self._rerank(query, lists[last], opened.documents)
                lists |= after
            yield lists, reranked, score_type

    def _rerank(
        self, query: str, first: Candidates, documents: Corpus
    ) -> tuple[dict[str, Candidates], dict[int, RerankResult], str]:
        """The stages after the list `first`, what the Reranker said of each row, and the type of the last scores."""
        texts = [documents.text(row) for row in first.rows.tolist()]
        results = self.reranker.rerank(query, texts, **self.options)
        order = np.array([result.document_index for result in results], np.int64)
        rows, logits = first.rows[order], np.array([result.score for result in results], np.float32)
        with_empty = np.where(logits > EMPTY_SCORE, logits, -np.inf)
        scores, score_type = shown_scores(with_empty, self.reranker.backend.calibration, self.normalize)
        stages = {RERANKED: Candidates(rows, scores.astype(np.float32), first.judged_scores)}
        if self.reranker_weight is not None:
            combined, score_type = combine(self.reranker_weight, first.scores[order], logits), COMBINED
            best = best_first(combined)
            stages[COMBINED] = Candidates(rows[best], combined[best], first.judged_scores)
        return stages, dict(zip(rows.tolist(), results, strict=True)), score_type


def _results(
    query: str,
    lists: dict[str, Candidates],
    reranked: dict[int, RerankResult],
    score_type: str,
    documents: Corpus,
    top_k: int,
) -> SearchResults:
    """The best of the last list, with what every stage says of them."""
    candidates = list(lists.values())[-1]
    places = {stage: {row: place for place, row in enumerate(of.rows.tolist())} for stage, of in lists.items()}
    results = []
    for place, row in enumerate(candidates.rows[:top_k].tolist()):
        found = {stage: of[row] for stage, of in places.items() if row in of}
        results.append(
            SearchResult(
                doc_id=documents.id(row),
                text=documents.text(row),
                score=float(candidates.scores[place]),
                rank=place + 1,
                metadata=documents.metadata(row),
                document_index=row,
                slice=reranked[row].slice if reranked else None,
                truncated=reranked[row].truncated if reranked else False,
                scores={stage: float(lists[stage].scores[of]) for stage, of in found.items()},
                ranks={stage: of + 1 for stage, of in found.items()},
            )
        )
    return SearchResults(query, results, score_type)
