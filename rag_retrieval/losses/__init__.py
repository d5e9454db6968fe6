"""Losses: functions of scores, labels and a mask that know no model, and the table a run picks one from.

What a reader would get wrong: the trainer never uses a loss's own mean. It sums the losses of all
micro-batches and processes of a step and divides once, by the count over the whole step, so that
accumulation, processes and padding change nothing. A loss and its `count` therefore belong together.

To add a loss: write the function with its count and chance level, enter it in `LOSSES`, test it. The tests of
`LOSSES` then hold it to the rules on padding, dtype, gradients and micro-batches that every loss obeys. Its name goes
into `loss_type` of the training configuration, which must not import torch and has the names for itself.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from rag_retrieval.losses.distillation import (
    chance_kl_distillation,
    chance_margin_mse,
    count_document_pairs,
    count_groups_of_several,
    kl_distillation,
    margin_mse,
)
from rag_retrieval.losses.graded_groups import count_graded_documents, count_graded_groups
from rag_retrieval.losses.lambda_loss import chance_lambda_loss, lambda_loss
from rag_retrieval.losses.likelihood import (
    chance_listmle,
    chance_position_listmle,
    listmle,
    position_listmle,
)
from rag_retrieval.losses.listwise import (
    chance_info_nce,
    chance_listnet,
    chance_listwise_ce,
    count_groups,
    count_positives,
    info_nce,
    listnet,
    listwise_ce,
)
from rag_retrieval.losses.pairwise import chance_ranknet, count_ordered_pairs, ranknet
from rag_retrieval.losses.pointwise import chance_bce, chance_mse, count_pairs, pointwise_bce, pointwise_mse
from rag_retrieval.losses.rank_error import adr_mse, chance_adr_mse

__all__ = [
    "LOSSES",
    "Loss",
    "adr_mse",
    "chance_adr_mse",
    "chance_bce",
    "chance_info_nce",
    "chance_kl_distillation",
    "chance_lambda_loss",
    "chance_listmle",
    "chance_listnet",
    "chance_listwise_ce",
    "chance_margin_mse",
    "chance_mse",
    "chance_position_listmle",
    "chance_ranknet",
    "count_document_pairs",
    "count_graded_documents",
    "count_graded_groups",
    "count_groups",
    "count_groups_of_several",
    "count_ordered_pairs",
    "count_pairs",
    "count_positives",
    "info_nce",
    "kl_distillation",
    "lambda_loss",
    "listmle",
    "listnet",
    "listwise_ce",
    "margin_mse",
    "pointwise_bce",
    "pointwise_mse",
    "position_listmle",
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
    reads: what of a record is given as labels: its labels, 1 for positives and 0 for the rest, or a teacher's scores.
    one_positive: whether a group must have exactly one label 1 and zeros besides.
    label_range: what labels must be within, both ends included; None: any finite number will do.
    options: keyword arguments of `function` that a configuration sets under the same names.
    chance_options: those of them that `chance` takes too.
    """

    name: str
    dataset_type: Literal["pointwise", "grouped"]
    function: Callable[..., Tensor]
    count: Callable[[Tensor, Tensor | None], int]
    chance: Callable[..., float]
    reads: Literal["label", "positive", "teacher_score"] = "label"
    one_positive: bool = False
    label_range: tuple[float, float] | None = None
    options: tuple[str, ...] = ()
    chance_options: tuple[str, ...] = ()


_LAMBDA = ("lambda_weights", "lambda_top_k")

_ALL = (
    Loss("point_ce", "pointwise", pointwise_bce, count_pairs, chance_bce, label_range=(0, 1)),
    Loss("point_mse", "pointwise", pointwise_mse, count_pairs, chance_mse, label_range=(0, 1)),
    Loss("pairwise_ranknet", "grouped", ranknet, count_ordered_pairs, chance_ranknet),
    Loss("listwise_ce", "grouped", listwise_ce, count_groups, chance_listwise_ce, reads="positive", one_positive=True,
         options=("temperature",)),
    Loss("listnet", "grouped", listnet, count_graded_groups, chance_listnet),
    Loss("listmle", "grouped", listmle, count_graded_groups, chance_listmle),
    Loss("position_listmle", "grouped", position_listmle, count_graded_groups, chance_position_listmle),
    Loss("lambda_loss", "grouped", lambda_loss, count_graded_groups, chance_lambda_loss, label_range=(0, 31),
         options=_LAMBDA, chance_options=_LAMBDA),
    Loss("info_nce", "grouped", info_nce, count_positives, chance_info_nce, reads="positive",
         options=("temperature",)),
    Loss("adr_mse", "grouped", adr_mse, count_graded_documents, chance_adr_mse),
    Loss("margin_mse", "grouped", margin_mse, count_document_pairs, chance_margin_mse, reads="teacher_score"),
    Loss("kl_distillation", "grouped", kl_distillation, count_groups_of_several, chance_kl_distillation,
         reads="teacher_score", options=("temperature",), chance_options=("temperature",)),
)  # fmt: skip

LOSSES: dict[str, Loss] = {loss.name: loss for loss in _ALL}
