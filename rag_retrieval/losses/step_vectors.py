"""Gradients of an embedding loss at the vectors of a whole step, in blocks of rows, so that no matrix of all queries
against all documents exists at once. Autograd sees vectors alone, neither the model nor other processes.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rag_retrieval.losses.embedding import Objective
from rag_retrieval.losses.step_targets import StepTargets

Direction = Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc", "own_documents"]
BLOCK_ELEMENTS = 1 << 22  # of one matrix of a block, over all widths: 16 MB in float32; some ten of them live at once
EPSILON = 1e-12  # vectors shorter than this count as this long, as in torch.nn.functional.normalize
NEAR_ZERO = 1e-4  # a loss that teaches nothing
REPORT = ("records", "near_zero", "positive_rank", "positive_cosine", "negative_cosine", "negatives", "masked")


class StepGradients(NamedTuple):
    """losses: float32 [own], one for each own record. queries, documents: the gradients of factor * losses.sum() at
    all vectors of the step, float32, shaped as the vectors. report: sums over own records, by the names of `REPORT`."""

    losses: Tensor
    queries: Tensor
    documents: Tensor
    report: dict[str, float]


def vector_gradients(
    objective: Objective,
    queries: Tensor,
    documents: Tensor,
    targets: StepTargets,
    factor: float,
    guide: tuple[Tensor, Tensor] | None = None,
    block_elements: int = BLOCK_ELEMENTS,
) -> StepGradients:
    """Losses of a process's own records, and what they add to the gradient at every vector of the step.

    The objective of a record is sum_w weight_w sum_l weight_l loss_l(its row at width w), where a vector at width w is
    its first w values, then normalized: Kusupati et al., "Matryoshka Representation Learning" (2022). Sums of these
    gradients over processes are the gradient of the whole step.

    queries: [Q, dim], float32, distinct texts, not normalized. documents: [D, dim], likewise. targets: on the same
    device. factor: of the sum of losses, in the gradients. guide: vectors of another model for the same texts, [Q, any]
    and [D, same], by which `false_negative_judge: guide` filters. block_elements: size of a block's largest matrix;
    results differ by rounding alone.
    """
    widths, weights = objective.widths_of(queries.shape[1])
    own = len(targets.negatives)
    columns = max(len(queries), len(documents), len(targets.queries), targets.negatives.shape[1] * queries.shape[1], 1)
    rows = max(1, block_elements // (columns * len(widths)))
    losses = queries.new_zeros(own)
    # under autocast the products would be bf16, where .9 moves by .004
    with torch.autocast(queries.device.type, enabled=False), torch.enable_grad():
        step = StepRows(
            StepVectors(queries, widths, objective.normalize),
            StepVectors(documents, widths, objective.normalize),
            targets,
            slice(0, own),
            guide and tuple(F.normalize(vectors.float(), dim=1) for vectors in guide),
        )
        for start in range(0, own, rows):
            block = replace(step, rows=slice(start, min(start + rows, own)), block_cache={})
            total = sum(
                loss_weight * (1.0 if loss.full_width else weight) * loss(replace(block, width=width))
                for width, weight in enumerate(weights)
                for loss, loss_weight in objective.terms
                if (width == len(widths) - 1 if loss.full_width else weight)
            )
            losses[block.rows] = total.detach()
            (factor * total.sum()).backward()
    sums = {"records": own, "near_zero": (losses < NEAR_ZERO).sum(), **step.report}
    report = {name: float(sums.get(name, 0.0)) for name in REPORT}
    return StepGradients(losses, step.queries.gradient(), step.documents.gradient(), report)


class StepVectors:
    """Vectors as leaves of autograd, cut into pieces between the widths, so that one product serves all widths."""

    def __init__(self, vectors: Tensor, widths: tuple[int, ...], normalize: bool):
        starts = (0, *widths[:-1])
        self.shape, self.normalize, self.widest = vectors.shape, normalize, widths[-1]
        self.pieces = [
            vectors[:, start:end].detach().clone(memory_format=torch.contiguous_format).requires_grad_()
            for start, end in zip(starts, widths, strict=True)
        ]
        with torch.no_grad():
            squares = torch.stack([piece.square().sum(dim=1) for piece in self.pieces]).cumsum(dim=0)
            lengths = squares.sqrt() if normalize else torch.ones_like(squares)
        # 1 / length at [width, vector], leaves too: their own gradient is taken once, not once a block
        self.scales = [scale.requires_grad_() for scale in lengths.clamp(min=EPSILON).reciprocal().unbind()]

    def __len__(self) -> int:
        return self.shape[0]

    def at(self, places: Tensor, width: int) -> Tensor:
        """The vectors at these places, at one width and normalized: [places, width]."""
        parts = torch.cat([piece[places] for piece in self.pieces[: width + 1]], dim=-1)
        return parts * self.scales[width][places].unsqueeze(-1)

    def against(self, places: Tensor, others: "StepVectors") -> list[Tensor]:
        """Cosines of the vectors at these places with all others, [places, others], for each width."""
        product, cosines = 0.0, []
        for piece, other, scale, other_scale in zip(
            self.pieces, others.pieces, self.scales, others.scales, strict=True
        ):
            product = product + piece[places] @ other.T
            cosines.append(product * scale[places].unsqueeze(1) * other_scale)
        return cosines

    def with_own(self, places: Tensor, others: "StepVectors", other_places: Tensor) -> list[Tensor]:
        """Cosines of the vectors at places [n] with those of theirs at other_places [n, k]: [n, k] for each width."""
        product, cosines = 0.0, []
        for piece, other, scale, other_scale in zip(
            self.pieces, others.pieces, self.scales, others.scales, strict=True
        ):
            product = product + torch.einsum("nd,nkd->nk", piece[places], other[other_places])
            cosines.append(product * scale[places].unsqueeze(1) * other_scale[other_places])
        return cosines

    @torch.no_grad()
    def gradient(self) -> Tensor:
        """Of all that was back-propagated, at the vectors as they were given: float32 [vectors, dim]."""
        # the gradient of 1 / |x| is -x / |x|^3
        of_lengths = [
            torch.zeros_like(scale) if scale.grad is None else -scale.grad * scale**3 for scale in self.scales
        ]
        gradient = torch.zeros(self.shape, dtype=self.pieces[0].dtype, device=self.pieces[0].device)
        parts = gradient.split([*(piece.shape[1] for piece in self.pieces), self.shape[1] - self.widest], dim=1)
        for place, (part, piece) in enumerate(zip(parts, self.pieces, strict=False)):
            if piece.grad is not None:
                part += piece.grad
            if self.normalize:
                part += piece * sum(of_lengths[place:]).unsqueeze(1)
        return gradient


@dataclass(frozen=True)
class StepRows:
    """Own records of a step at one width, as a loss sees them; the loss returns one value for each: [rows].

    rows: which of the process's own records. width: index of the width, the last is the widest. `cosines` are float32,
    products of vectors where the objective does not normalize.
    """

    queries: StepVectors
    documents: StepVectors
    targets: StepTargets
    rows: slice
    guide: tuple[Tensor, Tensor] | None = None
    width: int = 0
    block_cache: dict[str, list[Tensor]] = field(default_factory=dict)  # shared by the widths of a block
    step_cache: dict[tuple[str, int], Any] = field(default_factory=dict)  # shared by the blocks of a step
    report: dict[str, Tensor] = field(default_factory=dict)  # likewise

    def __len__(self) -> int:
        return self.rows.stop - self.rows.start

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

    def cosines(self, direction: Direction) -> Tensor:
        """Of the record's query, or of its positive for doc_to_*, with all queries or documents of the step; for
        own_documents with `own_documents`, anything at padding. [rows, columns]."""
        if direction not in self.block_cache:
            with torch.enable_grad():  # whoever asks first: the others need the graph
                self.block_cache[direction] = self._cosines(direction)
        return self.block_cache[direction][self.width]

    def _cosines(self, direction: Direction) -> list[Tensor]:
        if direction == "own_documents":
            return self.queries.with_own(self.own_queries, self.documents, self.own_documents.clamp(min=0))
        of_query, with_queries = direction.startswith("query"), direction.endswith("query")
        vectors = self.queries if of_query else self.documents
        places = self.own_queries if of_query else self.positives
        return vectors.against(places, self.queries if with_queries else self.documents)

    def positive_columns(self, direction: Direction) -> Tensor | None:
        """Where the pair of query and positive stands in a row of `cosines`: int64 [rows]; None where it does not."""
        columns = {
            "query_to_doc": self.positives,
            "doc_to_query": self.own_queries,
            "own_documents": torch.zeros_like(self.positives),
        }
        return columns.get(direction)

    def positive_cosines(self) -> Tensor:
        """Of query and positive: [rows]."""
        direction = "query_to_doc" if "query_to_doc" in self.block_cache else "own_documents"
        return self.cosines(direction).gather(1, self.positive_columns(direction).unsqueeze(1)).squeeze(1)

    def pair_cosines(self) -> Tensor:
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
        """Which columns of `cosines` are the positive, or no document or query that the data name as a match: bool
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
        """As `cosines`, by the guide's vectors, without a graph."""
        assert self.guide is not None, "false_negative_judge: guide needs the vectors of a guide"
        queries, documents = self.guide
        rows = documents[self.positives] if direction.startswith("doc") else queries[self.own_queries]
        if direction == "own_documents":
            return torch.einsum("nd,nkd->nk", rows, documents[self.own_documents.clamp(min=0)])
        return rows @ (queries if direction.endswith("query") else documents).T

    @torch.no_grad()
    def observe(self, direction: Direction, allowed: Tensor, masked: Tensor | int = 0) -> None:
        """Add to the report how the positive stands among the candidates of query_to_doc or own_documents, at the
        widest width; of several losses the first one's. allowed: bool, as `cosines`, with the positive. masked: number
        of candidates left out."""
        if self.width < len(self.queries.scales) - 1 or "report" in self.block_cache:
            return
        self.block_cache["report"] = []
        cosines, positive = self.cosines(direction), self.positive_cosines().unsqueeze(1)
        negatives = allowed.scatter(1, self.positive_columns(direction).unsqueeze(1), False)
        values = {
            "positive_rank": len(self) + (negatives & (cosines > positive)).sum(),
            "positive_cosine": positive.sum(),
            "negative_cosine": cosines.masked_fill(~negatives, 0.0).sum(),
            "negatives": negatives.sum(),
            "masked": masked,
        }
        for name, value in values.items():
            self.report[name] = self.report.get(name, 0) + value
