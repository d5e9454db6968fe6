"""Losses: functions of scores, labels and a mask that know no model, and the table a run picks one from.

What a reader would get wrong: the trainer never uses a loss's own mean. It sums the losses of all
micro-batches and processes of a step and divides once, by the count over the whole step, so that
accumulation, processes and padding change nothing. A loss and its `count` therefore belong together.

To add a loss: write the function with its count and chance level, enter it in `LOSSES`, test it. The tests of
`LOSSES` then hold it to the rules on padding, dtype, gradients and micro-batches that every loss obeys.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rag_retrieval.losses.listwise import chance_listwise_ce, count_groups, listwise_ce
from rag_retrieval.losses.pairwise import chance_ranknet, count_ordered_pairs, ranknet
from rag_retrieval.losses.pointwise import chance_bce, chance_mse, count_pairs, pointwise_bce, pointwise_mse

__all__ = [
    "LOSSES",
    "Loss",
    "chance_bce",
    "chance_listwise_ce",
    "chance_mse",
    "chance_ranknet",
    "count_groups",
    "count_ordered_pairs",
    "count_pairs",
    "listwise_ce",
    "pointwise_bce",
    "pointwise_mse",
    "ranknet",
]


@dataclass(frozen=True)
class Loss:
    """A loss with all that a training step needs to know of it.

    name: the value of `loss_type` in a configuration file.
    dataset_type: the records it fits; "pointwise" has tensors of [pairs], "grouped" of [groups, documents].
    function: (scores, labels, mask, reduction="mean" or "sum") to a float32 scalar with a graph.
    count: (labels, mask) to the number of items that the mean divides by, for tensors on the CPU.
    chance: (labels, mask) to the mean loss of the best constant score: what a model that learned nothing
        gives. Also for tensors on the CPU.
    one_positive: whether a group must have exactly one label 1 and zeros besides.
    """

    name: str
    dataset_type: Literal["pointwise", "grouped"]
    function: Callable[..., Tensor]
    count: Callable[[Tensor, Tensor | None], int]
    chance: Callable[[Tensor, Tensor | None], float]
    one_positive: bool = False


_ALL = (
    Loss("point_ce", "pointwise", pointwise_bce, count_pairs, chance_bce),
    Loss("point_mse", "pointwise", pointwise_mse, count_pairs, chance_mse),
    Loss("pairwise_ranknet", "grouped", ranknet, count_ordered_pairs, chance_ranknet),
    Loss("listwise_ce", "grouped", listwise_ce, count_groups, chance_listwise_ce, one_positive=True),
)

LOSSES: dict[str, Loss] = {loss.name: loss for loss in _ALL}
