"""The table of embedding losses, and the objective that a configuration makes of them.

A loss is a function of the rows of a step (`losses/step_vectors.py`: `StepRows`) that returns one float32 value for
each of its records; gradients, blocks, widths and processes are the caller's. To add a loss, write its function and
enter it in `EMBEDDING_LOSSES`; a user's own loss needs no entry: `my_package.losses:my_loss`. torch is imported when a
function is asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from rag_retrieval.losses import LossOption, function_at

if TYPE_CHECKING:
    from torch import Tensor

    from rag_retrieval.losses.step_vectors import StepRows


@dataclass(frozen=True)
class EmbeddingLoss:
    """A loss of a step's vectors.

    name: in a configuration. path: `module:function` of (StepRows, **options) to float32 [rows]. aliases: other names.
    reads: what the records must have. options: what a configuration may set; option_values: what it has set.
    full_width: it compares with vectors of the full width, so that Matryoshka's widths do not apply.
    """

    name: str
    path: str
    reads: Literal["positives", "label", "teacher_score", "teacher_vectors"] = "positives"
    options: tuple[LossOption, ...] = ()
    option_values: Mapping[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()
    full_width: bool = False

    @property
    def function(self) -> "Callable[..., Tensor]":
        return function_at(self.path)

    def __call__(self, step: "StepRows") -> "Tensor":
        return self.function(step, **self.option_values)


@dataclass(frozen=True)
class Objective:
    """What a step minimizes: a weighted sum of losses, over the widths of Matryoshka.

    terms: losses with their weights. widths: of the vectors' beginnings; None: the whole vector alone. width_weights:
    one for each width; None: 1 each. normalize: cosines, else products of the vectors as they are.
    """

    terms: tuple[tuple[EmbeddingLoss, float], ...]
    widths: tuple[int, ...] | None = None
    width_weights: tuple[float, ...] | None = None
    normalize: bool = True

    def widths_of(self, dim: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Ascending widths and their weights for vectors of this width. A width beyond it is cut to it; of equal ones
        the first counts. Where a loss needs the full width, it is there, if need be with the weight 0."""
        widths = self.widths or (dim,)
        chosen: dict[int, float] = {}
        for width, weight in zip(widths, self.width_weights or (1.0,) * len(widths), strict=True):
            chosen.setdefault(min(width, dim), weight)
        if any(loss.full_width for loss, _ in self.terms):
            chosen.setdefault(dim, 0.0)
        return tuple(sorted(chosen)), tuple(chosen[width] for width in sorted(chosen))


_CONTRASTIVE = "rag_retrieval.losses.contrastive"
_CONTRASTIVE_OPTIONS = (
    LossOption("temperature", float, 0.02, "divides cosines", {"gt": 0}),
    LossOption("directions", tuple[Literal["query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc"], ...],
               ("query_to_doc",), "what is compared, in one denominator; query_to_doc must be among them"),
    LossOption("use_inbatch_neg", bool, True, "other records' documents are negatives too"),
    LossOption("margin", float, 0.0, "subtracted from the positive's cosine"),
    LossOption("hardness_mode", Literal["in_batch_negatives", "hard_negatives", "all_negatives"],
               "in_batch_negatives", "negatives that hardness_strength weights"),
    LossOption("hardness_strength", float, 0.0, "weight exp(strength * cosine) of a negative", {"ge": 0}),
    LossOption("false_negative_margin", float, None,
               "leaves out candidates that score higher than the positive by more than this"),
    LossOption("false_negative_margin_type", Literal["absolute", "relative"], "absolute",
               "whether that margin is a difference or a share of the positive's score"),
    LossOption("false_negative_judge", Literal["model", "guide", "teacher"], "model", "whose scores that compares"),
)  # fmt: skip

_ALL = (
    EmbeddingLoss("info_nce", f"{_CONTRASTIVE}:info_nce", options=_CONTRASTIVE_OPTIONS),
)  # fmt: skip

EMBEDDING_LOSSES: dict[str, EmbeddingLoss] = {loss.name: loss for loss in _ALL}
EMBEDDING_ALIASES: dict[str, str] = {alias: loss.name for loss in _ALL for alias in loss.aliases}


def objective_of(
    weights: Mapping[str, float],
    options: Mapping[str, Any] | None = None,
    matryoshka_dims: Sequence[int] | None = None,
    matryoshka_weights: Sequence[float] | None = None,
    normalize: bool = True,
) -> Objective:
    """The objective with these losses, by name or `module:function`, and their weights.

    options: values by name, each for the losses that have such an option. Raises ValueError for a loss that is not
    there, an option that no loss of these has, and widths and weights of different number.
    """
    options = options or {}
    terms = []
    for name, weight in weights.items():
        loss = EMBEDDING_LOSSES.get(EMBEDDING_ALIASES.get(name, name))
        if loss is None and ":" not in name:
            raise ValueError(f"loss: found {name!r}; expected one of {', '.join(EMBEDDING_LOSSES)}, or module:function")
        loss = loss or EmbeddingLoss(name, name)
        own = {option.name for option in loss.options}
        values = {**loss.option_values, **{key: value for key, value in options.items() if key in own}}
        terms.append((replace(loss, option_values=values), weight))
    unknown = set(options) - {option.name for loss, _ in terms for option in loss.options}
    if unknown:
        raise ValueError(f"{', '.join(sorted(unknown))}: no option of {', '.join(weights)}")
    if matryoshka_weights and len(matryoshka_weights) != len(matryoshka_dims or ()):
        raise ValueError(
            f"matryoshka_weights has {len(matryoshka_weights)} values, matryoshka_dims {len(matryoshka_dims or ())}; "
            "give one weight for each width"
        )
    widths, width_weights = (tuple(values) if values else None for values in (matryoshka_dims, matryoshka_weights))
    return Objective(tuple(terms), widths, width_weights, normalize)
