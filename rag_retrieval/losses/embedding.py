"""The table of embedding losses, and the objective that a configuration makes of them.

A loss is a function of the rows of a step (`losses/step_rows.py`: `StepRows`) that returns one float32 value for
each of its records; gradients, blocks, widths and processes are the caller's. To add a loss, write its function and
enter it in `EMBEDDING_LOSSES`; a user's own loss needs no entry: `my_package.losses:my_loss`. torch is imported when a
function is asked for.
"""

from collections.abc import Callable, Mapping, Sequence, Sized
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from rag_retrieval.losses import LossOption, function_at
from rag_retrieval.losses.custom import own_function

if TYPE_CHECKING:
    from torch import Tensor

# representations, by the names of `models.representations`, and the weighted sum of their scores
DENSE, LEXICAL, MULTI_VECTOR, ENSEMBLE = "dense", "lexical", "multi_vector", "ensemble"

Reads = Literal["positives", "label", "teacher_score", "teacher_vectors"]


@dataclass(frozen=True)
class EmbeddingLoss:
    """A loss of a step's vectors.

    name: in a configuration. path: `module:function` of (StepRows, **options) to float32 [rows]. aliases: other names.
    parts: of a loss that is the sum of others of the table, their names and weights; it has no function of its own.
    reads: what the records must have. label_range: what labels must be within, both ends included; None: any numbers.
    options: what a configuration may set; option_values: what is set, by it or by the table.
    own_texts: a record's value is of its own texts alone, whatever else is in the step.
    full_width: it compares with vectors of the full width, so that Matryoshka's widths do not apply.
    """

    name: str
    path: str
    reads: Reads = "positives"
    options: tuple[LossOption, ...] = ()
    option_values: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    label_range: tuple[float, float] | None = None
    own_texts: bool = False
    full_width: bool = False
    parts: Mapping[str, float] = field(default_factory=dict)

    @property
    def function(self) -> "Callable[..., Tensor]":
        return function_at(self.path)

    def __call__(self, step: Sized) -> "Tensor":
        """One value for each record of the step (a `StepRows`); ValueError where a function returns something else."""
        losses = self.function(step, **self.option_values)
        if losses.shape != (len(step),):
            shape = list(losses.shape)
            raise ValueError(
                f"loss {self.name}: returned shape {shape}, expected one value for each of {len(step)} records"
            )
        return losses


@dataclass(frozen=True)
class SelfDistillation:
    """The ensemble's scores teach those of each representation: see `step_gradients.unified_loss`.

    weights: of each representation's loss, divided by their number already. start_step: in steps of which more than so
    many came before; -1: from the first on. temperature, use_inbatch_neg: see `embedding_distillation`.
    """

    weights: Mapping[str, float]
    start_step: int = -1
    temperature: float = 0.02
    use_inbatch_neg: bool = True


@dataclass(frozen=True)
class Flops:
    """Weights of the regularization of lexical weights: see `step_weights.flops`. ramp_steps: optimizer steps over
    which they grow quadratically from 0."""

    lambda_query: float
    lambda_document: float
    ramp_steps: int = 0


@dataclass(frozen=True)
class Objective:
    """What a step minimizes: a weighted sum of losses on the scores of each representation, and of their ensemble.

    terms: losses with their weights. widths: of the dense vectors' beginnings (Matryoshka); None: the whole vector
    alone. width_weights: one for each width; None: their mean. normalize: cosines of dense vectors, else products.
    loss_weights: by dense, lexical, multi_vector or ensemble, of the terms on its scores; `unified.unified` sets this
    and what follows. ensemble_weights: of the scores in the ensemble's. multi_vector_mean: whether MaxSim is divided by
    the number of the query's vectors.
    """

    terms: tuple[tuple[EmbeddingLoss, float], ...]
    widths: tuple[int, ...] | None = None
    width_weights: tuple[float, ...] | None = None
    normalize: bool = True
    loss_weights: Mapping[str, float] = field(default_factory=lambda: {DENSE: 1.0})
    ensemble_weights: Mapping[str, float] = field(default_factory=dict)
    self_distillation: SelfDistillation | None = None
    flops: Flops | None = None
    multi_vector_mean: bool = False

    @property
    def reads(self) -> frozenset[str]:
        """What the step must have: of its records as `EmbeddingLoss.reads`, and "guide" for the vectors of a guide."""
        needed = {str(loss.reads) for loss, _ in self.terms}
        for loss, _ in self.terms:
            judge = loss.option_values.get("false_negative_judge")
            if loss.option_values.get("false_negative_margin") is not None and judge in ("teacher", "guide"):
                needed.add("teacher_score" if judge == "teacher" else "guide")
        return frozenset(needed)

    def widths_of(self, dim: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Ascending widths and their weights for vectors of this width. A width beyond it is cut to it; of equal ones
        the first counts. Where a loss needs the full width, it is there, if need be with the weight 0."""
        widths = self.widths or (dim,)
        chosen: dict[int, float] = {}
        weights = self.width_weights or (1 / len({min(width, dim) for width in widths}),) * len(widths)
        for width, weight in zip(widths, weights, strict=True):
            chosen.setdefault(min(width, dim), weight)
        if any(loss.full_width for loss, _ in self.terms):
            chosen.setdefault(dim, 0.0)
        return tuple(sorted(chosen)), tuple(chosen[width] for width in sorted(chosen))


_CONTRASTIVE, _DISTILLATION = (f"rag_retrieval.losses.{module}" for module in ("contrastive", "embedding_distillation"))
TEMPERATURE = LossOption("temperature", float, 0.02, "divides cosines", {"gt": 0})
WIDE_TEMPERATURE = LossOption("temperature", float, 0.05, "divides cosines", {"gt": 0})
TEACHER_TEMPERATURE = LossOption("teacher_temperature", float, 1.0, "divides teacher scores", {"gt": 0})
IN_BATCH = LossOption("use_inbatch_neg", bool, True, "other records' documents are negatives too")
TRIPLET_MARGIN = LossOption("triplet_margin", float, 0.015, "by which similarities are to differ", {"ge": 0})
CONTRASTIVE_OPTIONS = (
    TEMPERATURE,
    IN_BATCH,
    LossOption("directions", tuple[Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"], ...],
               ("query_to_doc",), "what is compared, in one denominator; query_to_doc must be among them",
               needs="use_inbatch_neg"),
    LossOption("margin", float, 0.0, "subtracted from the positive's cosine"),
    LossOption("hardness_strength", float, 0.0, "weight exp(strength * cosine) of a negative", {"ge": 0}),
    LossOption("hardness_mode", Literal["in_batch_negatives", "hard_negatives", "all_negatives"],
               "in_batch_negatives", "negatives that hardness_strength weights", needs="hardness_strength"),
    LossOption("false_negative_margin", float, None,
               "leaves out candidates that score higher than the positive by more than this"),
    LossOption("false_negative_margin_type", Literal["absolute", "relative"], "absolute",
               "whether that margin is a difference or a share of the positive's score", needs="false_negative_margin"),
    LossOption("false_negative_judge", Literal["model", "guide", "teacher"], "model", "whose scores that compares"),
)  # fmt: skip

_ALL = (
    EmbeddingLoss("info_nce", f"{_CONTRASTIVE}:info_nce", options=CONTRASTIVE_OPTIONS),
    EmbeddingLoss("qwen3_info_nce", f"{_CONTRASTIVE}:info_nce", options=CONTRASTIVE_OPTIONS,
                  option_values={"directions": ("query_to_doc", "query_to_query", "doc_to_doc"),
                                 "false_negative_margin": 0.1, "temperature": 0.01}),
    EmbeddingLoss("cosent", f"{_CONTRASTIVE}:cosent", "label", (WIDE_TEMPERATURE,)),
    EmbeddingLoss("cosine_regression", f"{_CONTRASTIVE}:cosine_regression", "label", label_range=(-1, 1),
                  own_texts=True),
    EmbeddingLoss("margin_mse", f"{_DISTILLATION}:margin_mse", "teacher_score", (WIDE_TEMPERATURE,), own_texts=True),
    EmbeddingLoss("kl_distillation", f"{_DISTILLATION}:kl_distillation", "teacher_score",
                  (TEMPERATURE, TEACHER_TEMPERATURE), aliases=("kl_div",), own_texts=True),
    EmbeddingLoss("m3_distillation", f"{_DISTILLATION}:m3_distillation", "teacher_score",
                  (TEMPERATURE, TEACHER_TEMPERATURE, IN_BATCH), aliases=("m3_kd_loss",)),
    EmbeddingLoss("teacher_cosine", f"{_DISTILLATION}:teacher_cosine", "teacher_vectors", own_texts=True,
                  full_width=True),
    EmbeddingLoss("teacher_similarity", f"{_DISTILLATION}:teacher_similarity", "teacher_vectors"),
    EmbeddingLoss("teacher_triplet", f"{_DISTILLATION}:teacher_triplet", "teacher_vectors", (TRIPLET_MARGIN,)),
    EmbeddingLoss("stella", "", "teacher_vectors", (TRIPLET_MARGIN,),
                  parts={"teacher_cosine": 10.0, "teacher_similarity": 200.0, "teacher_triplet": 20.0}),
)  # fmt: skip

# of a unified objective, not of a configuration's loss_type
SELF_DISTILLATION = EmbeddingLoss(
    "self_distillation", f"{_DISTILLATION}:self_distillation", options=(TEMPERATURE, IN_BATCH)
)

EMBEDDING_LOSSES: dict[str, EmbeddingLoss] = {loss.name: loss for loss in _ALL}
EMBEDDING_ALIASES: dict[str, str] = {alias: loss.name for loss in _ALL for alias in loss.aliases}


def embedding_loss_named(name: str) -> EmbeddingLoss:
    """The loss of the table with this name or alias, or a user's function at `module:function`, which is imported."""
    if ":" in name:
        own_function(name, "step")
        return EmbeddingLoss(name, name)
    if EMBEDDING_ALIASES.get(name, name) not in EMBEDDING_LOSSES:
        raise ValueError(f"loss: found {name!r}; expected one of {', '.join(EMBEDDING_LOSSES)}, or module:function")
    return EMBEDDING_LOSSES[EMBEDDING_ALIASES.get(name, name)]


def objective_of(
    weights: Mapping[str, float],
    options: Mapping[str, Any] | None = None,
    matryoshka_dims: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    normalize: bool = True,
) -> Objective:
    """The objective with these losses, by name or `module:function`, and their weights.

    weights: of a loss with parts, a factor of their weights. options: values by name, each for the losses that have
    such an option. Raises ValueError for a loss that is not there, a function that cannot be imported or does not take
    a step, an option that no loss of these has, directions without query_to_doc, and widths and weights of different
    number.
    """
    options = options or {}
    terms = []
    for name, weight in weights.items():
        for part, share in (embedding_loss_named(name).parts or {name: 1.0}).items():
            loss = embedding_loss_named(part)
            own = {option.name for option in loss.options}
            values = {**loss.option_values, **{key: value for key, value in options.items() if key in own}}
            terms.append((replace(loss, option_values=values), share * weight))
    unknown = set(options) - {option.name for loss, _ in terms for option in loss.options}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no option of {', '.join(weights)}")
    if "query_to_doc" not in options.get("directions", ("query_to_doc",)):
        raise ValueError(f"directions: found {', '.join(options['directions'])}; query_to_doc must be among them")
    if matryoshka_weights and len(matryoshka_weights) != len(matryoshka_dims or ()):
        raise ValueError(
            f"matryoshka_weights has {len(matryoshka_weights)} values, matryoshka_dims {len(matryoshka_dims or ())}; "
            "give one weight for each width"
        )
    widths, width_weights = (tuple(values) if values else None for values in (matryoshka_dims, matryoshka_weights))
    return Objective(tuple(terms), widths, width_weights, normalize)
