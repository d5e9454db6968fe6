"""The table of losses: what a configuration may name as `loss_type`, and all that a run must know of each.

A loss is a function of scores, labels and a mask that returns a sum and a count. It knows no model, and it takes no
mean: the trainer adds the sums of all micro-batches and processes of a step and divides once, by the count of the
whole step, so that accumulation, processes and padding change nothing.

To add a loss, write its function and enter it in `LOSSES`; configuration, help, checks of a resume and tests read the
table. A user's own loss needs no entry: `losses/custom.py`. torch is imported when a function is asked for.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib import import_module
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class LossOption:
    """A keyword argument of a loss's function, which a configuration sets under the same name.

    type, limits: what it takes, for pydantic: float with {"gt": 0}, or a Literal. default: the function's own; None
    means off. description: of the key, without default and losses. needs: an option before it without which (None, 0 or
    false) it has no effect.
    """

    name: str
    type: Any
    default: Any
    description: str
    limits: Mapping[str, float] = field(default_factory=dict)
    needs: str | None = None


@dataclass(frozen=True)
class Loss:
    """A loss with all that a training step needs to know of it.

    name: the value of `loss_type` in a configuration file. aliases: other spellings of it.
    dataset_type: the records it fits; "pointwise" has tensors of [pairs], "grouped" of [groups, documents].
    path: `module:function` of (scores, labels, mask, **options) to (sum, count): a float32 scalar with a graph, and an
        integer scalar that depends on labels and mask alone.
    reads: what of a record is given as labels: its labels, 1 for positives and 0 for the rest, or a teacher's scores.
    one_positive: whether a group must have exactly one label 1 and zeros besides.
    label_range: what labels must be within, both ends included; None: any finite number will do.
    options: what a configuration may set. option_values: what it has set, by name; else the function's defaults hold.
    constant_path: `module:function` of (labels, mask, **options) to the mean loss of the best constant score, where
        that is not the loss of zeros.
    """

    name: str
    dataset_type: Literal["pointwise", "grouped"]
    path: str
    aliases: tuple[str, ...] = ()
    reads: Literal["label", "positive", "teacher_score"] = "label"
    one_positive: bool = False
    label_range: tuple[float, float] | None = None
    options: tuple[LossOption, ...] = ()
    option_values: Mapping[str, Any] = field(default_factory=dict)
    constant_path: str | None = None

    @property
    def function(self) -> "Callable[..., tuple[Tensor, Tensor]]":
        return function_at(self.path)

    def __call__(self, scores: "Tensor", labels: "Tensor", mask: "Tensor | None" = None) -> "tuple[Tensor, Tensor]":
        """(sum, count) with the options that are set. mask: None where nothing is padding."""
        import torch

        mask = torch.ones_like(labels, dtype=torch.bool) if mask is None else mask
        return self.function(scores, labels, mask, **self.option_values)

    def count(self, labels: "Tensor", mask: "Tensor | None" = None) -> int:
        """The number of items that the mean divides by. Call it on CPU tensors: on a GPU it waits for the device."""
        return int(self._of_zeros(labels, mask)[1])

    def constant_score_loss(self, labels: "Tensor", mask: "Tensor | None" = None) -> float:
        """The mean loss of the best constant score, which a model that learned nothing gives; 0.0 where there is
        nothing to count. For CPU tensors."""
        if self.constant_path is not None:
            return function_at(self.constant_path)(labels, mask, **self.option_values)
        total, count = self._of_zeros(labels, mask)
        return float(total) / max(int(count), 1)

    def _of_zeros(self, labels: "Tensor", mask: "Tensor | None") -> "tuple[Tensor, Tensor]":
        import torch

        with torch.no_grad():
            return self(torch.zeros_like(labels, dtype=torch.float32), labels, mask)


def function_at(path: str) -> Callable:
    """The function at `module:function`, whose module is imported now."""
    module, _, name = path.partition(":")
    return getattr(import_module(module), name)


_POINTWISE, _PAIRWISE, _LISTWISE, _DISTILLATION = (
    f"rag_retrieval.losses.{module}" for module in ("pointwise", "pairwise", "listwise", "distillation")
)
TEMPERATURE = LossOption("temperature", float, 1.0, "divides scores", {"gt": 0})
LAMBDA_OPTIONS = (
    LossOption("lambda_weights", Literal["ndcg_loss2pp", "lambdarank"], "ndcg_loss2pp", "how it weights pairs"),
    LossOption("lambda_top_k", int, None, "k of the nDCG@k to learn. Absent: the whole ranking", {"ge": 1}),
)

_ALL = (
    Loss("point_ce", "pointwise", f"{_POINTWISE}:pointwise_bce", aliases=("pointwise_bce",), label_range=(0, 1),
         constant_path=f"{_POINTWISE}:bce_of_best_constant"),
    Loss("point_mse", "pointwise", f"{_POINTWISE}:pointwise_mse", aliases=("pointwise_mse",), label_range=(0, 1),
         constant_path=f"{_POINTWISE}:mse_of_best_constant"),
    Loss("pairwise_ranknet", "grouped", f"{_PAIRWISE}:ranknet"),
    Loss("listwise_ce", "grouped", f"{_LISTWISE}:listwise_ce", reads="positive", one_positive=True,
         options=(TEMPERATURE,)),
    Loss("listnet", "grouped", f"{_LISTWISE}:listnet"),
    Loss("listmle", "grouped", f"{_LISTWISE}:listmle"),
    Loss("position_listmle", "grouped", f"{_LISTWISE}:position_listmle"),
    Loss("lambda_loss", "grouped", f"{_PAIRWISE}:lambda_loss", label_range=(0, 31), options=LAMBDA_OPTIONS,
         constant_path=f"{_PAIRWISE}:lambda_loss_of_random_order"),
    Loss("info_nce", "grouped", f"{_LISTWISE}:info_nce", reads="positive", options=(TEMPERATURE,)),
    Loss("adr_mse", "grouped", f"{_LISTWISE}:adr_mse"),
    Loss("margin_mse", "grouped", f"{_DISTILLATION}:margin_mse", reads="teacher_score"),
    Loss("kl_distillation", "grouped", f"{_DISTILLATION}:kl_distillation", reads="teacher_score",
         options=(TEMPERATURE,)),
)  # fmt: skip

LOSSES: dict[str, Loss] = {loss.name: loss for loss in _ALL}
ALIASES: dict[str, str] = {alias: loss.name for loss in _ALL for alias in loss.aliases}


def __getattr__(name: str) -> Callable:
    """The functions of the table by their own names: `from rag_retrieval.losses import listnet`."""
    for loss in _ALL:
        if loss.path.endswith(f":{name}"):
            return loss.function
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
