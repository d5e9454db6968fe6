"""What the stages of a search found for one query, as results and as the answer of the server.

Nothing here imports torch.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar

from rag_retrieval.data.corpus import Corpus
from rag_retrieval.infer.long_documents import ScoredPair
from rag_retrieval.infer.results import RerankResult, RerankResults
from rag_retrieval.retrieval.best_passage import QueryWords
from rag_retrieval.retrieval.candidates import Candidates

ENCODE, FILTER = "encode", "filter"  # before the stages: the query by the model, the filter on the metadata


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


@dataclass(frozen=True)
class Searched:
    """stages: what each found, by its name, in the order in which they work; the last is the result. seconds: of each
    stage and, where there are such, of ENCODE and FILTER; what queries that are asked
    together share is that of all of them. score_type: of `SearchResults`. words: of the query, by which the best
    passage of a text is found. scored: what the reranker said of each row.
    """

    query: str
    documents: Corpus
    stages: Mapping[str, Candidates]
    seconds: Mapping[str, float]
    score_type: str
    words: QueryWords
    scored: Mapping[int, ScoredPair] = field(default_factory=dict)

    @property
    def last(self) -> Candidates:
        return list(self.stages.values())[-1]

    def texts(self) -> list[str]:
        """Of the last stage's documents, in their order: what a reranker reads."""
        return [self.documents.text(row) for row in self.last.rows.tolist()]

    @cached_property
    def _places(self) -> dict[str, dict[int, int]]:
        return {stage: {row: place for place, row in enumerate(of.rows.tolist())} for stage, of in self.stages.items()}

    def results(self, top_k: int) -> SearchResults:
        """The best of the last stage, with what every stage says of them."""
        rows = self.last.rows[:top_k].tolist()
        return SearchResults(self.query, [self._result(row, rank) for rank, row in enumerate(rows, 1)], self.score_type)

    def _result(self, row: int, rank: int) -> SearchResult:
        found = {stage: of[row] for stage, of in self._places.items() if row in of}
        scored = self.scored.get(row)
        return SearchResult(
            doc_id=self.documents.id(row),
            text=self.documents.text(row),
            score=float(self.last.scores[rank - 1]),
            rank=rank,
            metadata=self.documents.metadata(row),
            document_index=row,
            slice=scored.span if scored else None,
            truncated=scored.truncated if scored else False,
            scores={stage: float(self.stages[stage].scores[place]) for stage, place in found.items()},
            ranks={stage: place + 1 for stage, place in found.items()},
        )

    def answer(self, top_k: int, with_stages: bool = False) -> dict[str, Any]:
        """What /search of the server says, as JSON values; see docs/serve.md. with_stages: whole lists of every stage
        with their seconds, and the documents in them that are not among the results."""
        results = [
            {
                "id": result.doc_id,
                "text": result.text,
                "score": result.score,
                "rank": result.rank,
                "metadata": result.metadata,
                "passage": self._passage(result.document_index, result.text),
                "truncated": result.truncated,
                "scores": result.scores,
                "ranks": result.ranks,
            }
            for result in self.results(top_k)
        ]
        answer = {"query": self.query, "results": results, "score_type": self.score_type}
        return answer | (self._stages_of_answer(top_k) if with_stages else {})

    def _passage(self, row: int, text: str) -> dict[str, int] | None:
        """The reranker's best slice; else the best passage by words."""
        scored = self.scored.get(row)
        best = (scored and scored.span) or self.words.best_passage(text)
        return best and {"start": best[0], "end": best[1]}

    def _stages_of_answer(self, top_k: int) -> dict[str, Any]:
        stages = [
            {
                "name": stage,
                "seconds": self.seconds[stage],
                "results": [
                    {"id": self.documents.id(row), "score": score, "rank": rank}
                    for rank, (row, score) in enumerate(zip(of.rows.tolist(), of.scores.tolist(), strict=True), 1)
                ],
            }
            for stage, of in self.stages.items()
        ]
        others = dict.fromkeys(row for of in self.stages.values() for row in of.rows.tolist())
        for row in self.last.rows[:top_k].tolist():
            del others[row]
        documents = {}
        for row in others:
            document = self.documents.document(row)
            own = {"text": document.text, "metadata": document.metadata, "passage": self._passage(row, document.text)}
            documents[document.id] = own
        before = {f"{name}_seconds": self.seconds[name] for name in (ENCODE, FILTER) if name in self.seconds}
        return {"stages": stages, "documents": documents} | before
