"""`Retriever`: the documents of an index that answer a query, found in stages.

    bm25, dense, lexical, multi_vector    searches of the index, each to `depth` documents
    fused       their lists as one, where there are two or more
    reranked    the list before it in the order of a Reranker's scores, where there is one
    combined    both scores added, where the fusion has a weight for this Reranker

The searches (`find`) and what a reranker's scores make of them (`reranked`) stand apart, so that a server can let its
own batches compute queries and pairs. torch is not imported for an index of words alone, and for exported models.
"""

import asyncio
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from time import perf_counter
from typing import TYPE_CHECKING, Any

import numpy as np

from rag_retrieval.infer.long_documents import NO_TEXT, ScoredPair, score_pairs
from rag_retrieval.infer.reranker import Reranker, open_reranker
from rag_retrieval.infer.results import best_first, shown_scores
from rag_retrieval.models.inputs import check_flag, check_list, check_number, check_text
from rag_retrieval.models.options import LONG_DOCUMENT_DEFAULT, OVERLAP
from rag_retrieval.retrieval.best_passage import query_words
from rag_retrieval.retrieval.bm25 import BM25
from rag_retrieval.retrieval.candidates import Candidates
from rag_retrieval.retrieval.config import DEPTH
from rag_retrieval.retrieval.fusion import FUSION_FILE, Fusion, combine
from rag_retrieval.retrieval.index import Index
from rag_retrieval.retrieval.searched import ENCODE, FILTER, Searched, SearchResults

if TYPE_CHECKING:
    from rag_retrieval.infer.embedder import Embedder
    from rag_retrieval.retrieval.encoding import Encoded

FUSED, RERANKED, COMBINED = "fused", "reranked", "combined"  # stages after the searches


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
            self.passage_encoder = self.reranker.passage_encoder(None, long_document, overlap)
        check_flag("normalize", normalize)
        check_number("batch_size", batch_size, 1, "pairs")
        self.depth, self.normalize, self.batch_size = depth, normalize, batch_size

    def search(self, query: str, top_k: int = 10, where: Mapping[str, Any] | None = None) -> SearchResults:
        """The best `top_k` documents, fewer where fewer were found; with equal scores in the order of the stage before.

        where: conditions on the metadata, all of which hold, such as {"language": "zh", "year": {"gte": 2020}}; every
        stage searches among the documents that they hold for. See `retrieval.filters`, and docs/search.md.

        Raises ValueError for a query that is no text, and for wrong conditions: their form, a field in which no
        document has a value, and a value of another kind than all of the field's.
        """
        return self._search([check_text("query", query)], top_k, where)[0]

    def search_many(
        self, queries: Sequence[str], top_k: int = 10, where: Mapping[str, Any] | None = None
    ) -> list[SearchResults]:
        """`search` for several queries, which are encoded together."""
        listed = check_list("queries", queries)
        texts = [check_text(f"queries[{place}]", query) for place, query in enumerate(listed)]
        return self._search(texts, top_k, where)

    async def asearch(self, query: str, top_k: int = 10, where: Mapping[str, Any] | None = None) -> SearchResults:
        """`search` in a thread, so that the event loop is not blocked."""
        return await asyncio.to_thread(self.search, query, top_k, where)

    def search_stages(
        self, queries: Sequence[str], depth: int | None = None, where: Mapping[str, Any] | None = None
    ) -> list[Mapping[str, Candidates]]:
        """For each query what every stage found, by its name, in the order in which they work; the last is the result.

        depth: in place of the Retriever's.
        """
        return [searched.stages for searched in self.searched(queries, depth, where)]

    def searched(
        self, queries: Sequence[str], depth: int | None = None, where: Mapping[str, Any] | None = None
    ) -> list[Searched]:
        """`search_stages` with seconds and scores, from which `results` and `answer` are made."""
        found = self.find(queries, depth, where)
        # one call of the Reranker for each: in a larger batch the last bits of a score depend on the other queries
        return found if self.reranker is None else list(map(self._rerank, found))

    def find(
        self,
        queries: Sequence[str],
        depth: int | None = None,
        where: Mapping[str, Any] | None = None,
        encoded: "Encoded | None" = None,
    ) -> list[Searched]:
        """`searched` before the reranking. encoded: the queries as the model of the index represents them (see
        `retrieval.encoding`), which is not asked then."""
        opened, depth, seconds = self.index.opened, self.depth if depth is None else depth, {}
        among = None
        if where is not None:
            with timed(seconds, FILTER):
                among = opened.filters.rows(where)
        if self.needs_model and encoded is None:
            _ = self.index.embedder  # opened now, so that a first query's time is without it
            with timed(seconds, ENCODE):
                encoded = self.index.represent_queries(list(queries))
        nothing, found = np.zeros(0, np.int64), {}
        for stage in self.stages:
            search, asked = opened.searches[stage], ([nothing] * len(queries), depth, among)
            with timed(seconds, stage):
                found[stage] = (
                    search.search(queries, *asked) if stage == BM25 else search.search_encoded(encoded, *asked)
                )
        searched = []
        for place, query in enumerate(queries):
            lists, own_seconds = {stage: of_stage[place] for stage, of_stage in found.items()}, dict(seconds)
            if len(self.stages) > 1:
                with timed(own_seconds, FUSED):
                    lists[FUSED] = self.fusion.fuse(lists, nothing, depth)
            words = query_words(query, opened.searches.get(BM25))
            searched.append(Searched(query, opened.documents, lists, own_seconds, list(lists)[-1], words))
        return searched

    def reranked(
        self, searched: Searched, scored: Sequence[ScoredPair], seconds: float, normalize: bool | None = None
    ) -> Searched:
        """With the stages after the reranking. scored: of the last stage's documents, in their order; the score of one
        without text is -inf. seconds: that it took. normalize: in place of the Retriever's."""
        first, seconds = searched.last, dict(searched.seconds) | {RERANKED: seconds}
        logits = np.array([pair.score for pair in scored], np.float32)
        order = best_first(logits)
        rows, logits = first.rows[order], logits[order]
        normalize = self.normalize if normalize is None else normalize
        scores, score_type = shown_scores(logits, self.reranker.backend.calibration, normalize)
        stages = {RERANKED: Candidates(rows, scores.astype(np.float32), first.judged_scores)}
        if self.reranker_weight is not None:
            with timed(seconds, COMBINED):
                combined, score_type = combine(self.reranker_weight, first.scores[order], logits), COMBINED
                best = best_first(combined)
                stages[COMBINED] = Candidates(rows[best], combined[best], first.judged_scores)
        by_row = dict(zip(first.rows.tolist(), scored, strict=True))
        return replace(searched, stages=searched.stages | stages, seconds=seconds, score_type=score_type, scored=by_row)

    @property
    def needs_model(self) -> bool:
        """Whether a stage compares what a model makes of the query."""
        return self.stages != [BM25]

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

    def _search(self, queries: list[str], top_k: int, where: Mapping[str, Any] | None) -> list[SearchResults]:
        check_number("top_k", top_k, 1, "documents")
        return [searched.results(top_k) for searched in self.searched(queries, max(self.depth, top_k), where)]

    def _rerank(self, searched: Searched) -> Searched:
        start, texts = perf_counter(), searched.texts()
        pairs = [(searched.query, text) for text in texts if text.strip()]
        scored = iter(score_pairs(self.reranker.backend, self.passage_encoder, pairs, self.batch_size))
        all_scored = [next(scored) if text.strip() else NO_TEXT for text in texts]
        return self.reranked(searched, all_scored, perf_counter() - start)


@contextmanager
def timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    start = perf_counter()
    yield
    seconds[name] = perf_counter() - start
