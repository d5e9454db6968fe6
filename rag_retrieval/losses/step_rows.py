"""What a loss sees: the process's own records of a step, with the scores of their texts, whatever represents them."""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor

from rag_retrieval.losses.step_targets import StepTargets
from rag_retrieval.losses.step_tokens import StepTokens
from rag_retrieval.losses.step_vectors import ALL, StepVectors
from rag_retrieval.losses.step_weights import StepWeights

StepTexts = StepVectors | StepWeights | StepTokens
Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc", "own_documents"]
OBSERVED = ("positive_rank", "positive_score", "negative_score", "negatives", "masked")  # sums over records


@dataclass(frozen=True)
class StepRows:
    """Own records of a step at one width, as a loss sees them; the loss returns one value for each: [rows].

    rows: which of the process's own records. width: index of the width. width_weights: of the loss at each width, of
    which the last is the widest; what is no dense vector has one alone. teacher: the same records with the scores that
    `self_distillation` learns. `scores` are float32: cosines of dense vectors, or products where the objective does not
    normalize; sums of products of lexical weights; MaxSim.
    """

    queries: StepTexts
    documents: StepTexts
    targets: StepTargets
    rows: slice
    guide: tuple[Tensor, Tensor] | None = None
    width: int = 0
    width_weights: tuple[float, ...] = (1.0,)
    teacher: "StepRows | None" = None
    block_cache: dict[str, list[Tensor]] = field(default_factory=dict)  # shared by the widths of a block
    step_cache: dict[tuple[str, int], Any] = field(default_factory=dict)  # shared by the blocks of a step
    report: dict[str, Tensor] = field(default_factory=dict)  # likewise

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

    def at_width(self, width: int) -> "StepRows":
        """The same records at the width of this index, which may be -1."""
        return replace(self, width=range(len(self.width_weights))[width])

    @property
    def own_queries(self) -> Tensor:
        """Rows of the records' queries among the step's: int64 [rows]."""
        return self.targets.queries[self.targets.own][self.rows]

    @property
    def positives(self) -> Tensor:
        """Columns of the records' positives among the step's documents: int64 [rows]."""
        return self.targets.positives[self.targets.own][self.rows]

    @property
    def negatives(self) -> Tensor:
        """Columns of the records' own negatives, -1 at padding: int64 [rows, k]."""
        return self.targets.negatives[self.rows]

    @property
    def own_documents(self) -> Tensor:
        """Columns of positive and own negatives, -1 at padding: int64 [rows, 1 + k]."""
        return torch.cat([self.positives.unsqueeze(1), self.negatives], dim=1)

    @property
    def teacher_scores(self) -> Tensor | None:
        """Of `own_documents`: float32 [rows, 1 + k]."""
        return None if self.targets.teacher_scores is None else self.targets.teacher_scores[self.rows]

    def scores(self, direction: Direction) -> Tensor:
        """Of the record's query, or of its positive for doc_to_*, with all queries or documents of the step; for
        own_documents with `own_documents`, anything at padding. [rows, columns]."""
        if direction not in self.block_cache:
            with torch.enable_grad():  # whoever asks first: the others need the graph
                self.block_cache[direction] = self._scores(direction)
        return self.block_cache[direction][self.width]

    def _scores(self, direction: Direction) -> list[Tensor]:
        if direction == "own_documents":
            return self.queries.with_own(self.own_queries, self.documents, self.own_documents.clamp(min=0))
        if direction == "doc_to_query":  # the scores of MaxSim are those of queries with documents
            return [scores.T for scores in self.queries.against(ALL, self.documents, self.positives)]
        if direction == "doc_to_doc":
            return self.documents.against(self.positives, self.documents)
        return self.queries.against(self.own_queries, self.queries if direction == "query_to_query" else self.documents)

    def positive_columns(self, direction: Direction) -> Tensor | None:
        """Where the pair of query and positive stands in a row of `scores`: int64 [rows]; None where it does not."""
        columns = {
            "query_to_doc": self.positives,
            "doc_to_query": self.own_queries,
            "own_documents": torch.zeros_like(self.positives),
        }
        return columns.get(direction)

    def positive_scores(self) -> Tensor:
        """Of query and positive: [rows]."""
        direction = "query_to_doc" if "query_to_doc" in self.block_cache else "own_documents"
        return self.scores(direction).gather(1, self.positive_columns(direction).unsqueeze(1)).squeeze(1)

    def pair_scores(self) -> Tensor:
        """Of query and positive of all records of the step, without a graph: [R]."""
        with torch.no_grad():
            positives = self.targets.positives.unsqueeze(1)
            return self.queries.with_own(self.targets.queries, self.documents, positives)[self.width].squeeze(1)

    def of_step(self, name: str, work: Callable[[], Any]) -> Any:
        """What a loss computes once a step and width from all records."""
        if (name, self.width) not in self.step_cache:
            self.step_cache[name, self.width] = work()
        return self.step_cache[name, self.width]

    def allowed(self, direction: Direction) -> Tensor:
        """Which columns of `scores` are the positive, or no document or query that the data name as a match: bool
        [rows, columns]. For *_to_query a query of which the positive is a known positive is no negative; for doc_to_doc
        neither are the record's own documents, nor for query_to_query its query."""
        if direction == "own_documents":
            own = self.own_documents
            return self.allowed("query_to_doc").gather(1, own.clamp(min=0)) & (own >= 0)
        of_queries = direction.endswith("query")
        allowed = torch.ones(
            len(self), len(self.queries if of_queries else self.documents), dtype=torch.bool,
            device=self.positives.device,
        )  # fmt: skip
        record, column = self.targets.excluded_queries if of_queries else self.targets.excluded
        here = (record >= self.rows.start) & (record < self.rows.stop)
        allowed[record[here] - self.rows.start, column[here]] = False
        if direction == "query_to_query":
            allowed.scatter_(1, self.own_queries.unsqueeze(1), False)
        elif direction == "doc_to_doc":
            allowed &= ~self.is_own_document()
        return allowed

    def is_own_document(self) -> Tensor:
        """Columns of the positive and of the own negatives: bool [rows, documents]."""
        own = torch.zeros(len(self), len(self.documents), dtype=torch.bool, device=self.positives.device)
        columns = self.own_documents
        # padding points at the positive, which is marked anyway
        return own.scatter_(1, torch.where(columns < 0, columns[:, :1], columns), True)

    def guide_cosines(self, direction: Direction) -> Tensor:
        """As `scores`, by the guide's vectors, without a graph."""
        assert self.guide is not None, "false_negative_judge: guide needs the vectors of a guide"
        queries, documents = self.guide
        rows = documents[self.positives] if direction.startswith("doc") else queries[self.own_queries]
        if direction == "own_documents":
            return torch.einsum("nd,nkd->nk", rows, documents[self.own_documents.clamp(min=0)])
        return rows @ (queries if direction.endswith("query") else documents).T

    @torch.no_grad()
    def observe(self, direction: Direction, allowed: Tensor, masked: Tensor | int = 0) -> None:
        """Add to the report how the positive stands among the candidates of query_to_doc or own_documents, at the
        widest width; of several losses the first one's. allowed: bool, as `scores`, with the positive. masked: number
        of candidates left out."""
        if self.width < len(self.width_weights) - 1 or "report" in self.block_cache:
            return
        self.block_cache["report"] = []
        scores, positive = self.scores(direction), self.positive_scores().unsqueeze(1)
        negatives = allowed.scatter(1, self.positive_columns(direction).unsqueeze(1), False)
        values = {
            "positive_rank": len(self) + (negatives & (scores > positive)).sum(),
            "positive_score": positive.sum(),
            "negative_score": scores.masked_fill(~negatives, 0.0).sum(),
            "negatives": negatives.sum(),
            "masked": masked,
        }
        for name, value in values.items():
            self.report[name] = self.report.get(name, 0) + value


@dataclass(frozen=True)
class EnsembleRows(StepRows):
    """Records whose scores are a weighted sum of those of others, each with its weight: the same records by one
    representation, at the widest width."""

    parts: tuple[tuple[float, StepRows], ...] = ()

    def _scores(self, direction: Direction) -> list[Tensor]:
        return [sum(weight * part.scores(direction) for weight, part in self.parts)]

    def pair_scores(self) -> Tensor:
        return sum(weight * part.pair_scores() for weight, part in self.parts)
