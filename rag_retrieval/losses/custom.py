"""Losses by name: those of the table, and a user's own function as `loss_type: my_package.losses:my_loss`.

A user's function has the signature of the shipped ones,

    def my_loss(scores, labels, mask):  # float32, float32 and bool; [pairs] or [groups, documents]
        ...
        return total, count  # a float scalar with a graph, and what a mean divides by, from labels and mask alone

and reads a teacher's scores where its second parameter is called `teacher_scores`. It is tried on a small batch when a
run starts: a sum that is a mean, or one that padding changes, would train something else without a word.
"""

import inspect
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Literal

from rag_retrieval.core.command import load_own
from rag_retrieval.losses import ALIASES, LOSSES, Loss

if TYPE_CHECKING:
    from torch import Tensor

OWN_LOSS = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")  # module:function


def loss_named(name: str, dataset_type: Literal["pointwise", "grouped"]) -> Loss:
    """The loss of the table with this name or alias, or a user's function at `module:function`.

    dataset_type: what the run trains on, which says what an own function is given. Raises ValueError for a name that
    is neither, and for an own function that does not keep to the signature or fails a check. A module is looked for
    where Python looks, then in the current folder.
    """
    if ":" not in name:
        if ALIASES.get(name, name) not in LOSSES:
            raise ValueError(f"loss_type: found {name!r}; expected one of {', '.join(LOSSES)}, or module:function")
        return LOSSES[ALIASES.get(name, name)]
    if not OWN_LOSS.fullmatch(name):
        raise ValueError(f"loss_type: found {name!r}; expected module:function, such as my_package.losses:my_loss")
    parameters = list(inspect.signature(own_function(name, "scores", "labels", "mask")).parameters)
    loss = Loss(name, dataset_type, name, reads="teacher_score" if parameters[1] == "teacher_scores" else "label")
    problem = _problem(loss)
    if problem:
        raise ValueError(f"loss_type {name}: {problem}; docs/extending.md says what a loss must return")
    return loss


def own_function(path: str, *arguments: str) -> Callable:
    """A user's function at `module:function`, imported; ValueError where it is not there or does not take so many
    arguments. arguments: their names, for the message."""
    function = load_own("loss_type", path)
    try:
        inspect.signature(function).bind(*arguments)
    except TypeError as error:
        raise ValueError(f"loss_type {path}: expected a function of {', '.join(arguments)}: {error}") from error
    return function


def _problem(loss: Loss) -> str | None:
    """What an own function does wrong on a small batch with padding; None where all is right."""
    import torch

    scores, labels, mask = _small_batch(loss)
    try:
        total, count, gradient = _tried(loss, scores, labels, mask)
    except Exception as error:  # whatever a user's code raises
        return f"fails on a batch of shape {list(scores.shape)}: {type(error).__name__}: {error}"
    if not (torch.isfinite(total) and torch.isfinite(gradient).all()):
        return f"the sum ({total.item()}) or its gradient is not finite on a small batch"
    if count <= 0 or not (gradient[mask] != 0).any():
        return f"a small batch with different labels has the count {count} and no gradient for some score"
    other_padding = scores.masked_fill(~mask, 3.0), labels.masked_fill(~mask, 1.0)
    if not _same(_tried(loss, *other_padding, mask), (total, count, gradient)) or (gradient[~mask] != 0).any():
        return "scores or labels where mask is False change the result; fill them before any arithmetic"
    if _tried(loss, 2 * scores, labels, mask)[1] != count:
        return "the count depends on the scores; it is taken before they are known"
    halves = [_tried(loss, *half) for half in zip(*(each.tensor_split(2) for each in (scores, labels, mask)))]  # noqa: B905
    together = halves[0][0] + halves[1][0], halves[0][1] + halves[1][1], torch.cat([half[2] for half in halves])
    if not _same(together, (total, count, gradient)):
        return "two halves of a batch do not add up to the whole; return a sum, not a mean"
    nothing = _tried(loss, scores, labels, torch.zeros_like(mask))
    if not _same(nothing, (torch.tensor(0.0), 0, torch.zeros_like(scores))):
        return "a batch of nothing but padding has a sum, a gradient or a count that is not 0"
    return None


def _tried(loss: Loss, scores: "Tensor", labels: "Tensor", mask: "Tensor") -> "tuple[Tensor, int, Tensor]":
    """(sum, count, gradient of the scores). Raises TypeError where the function returns something else."""
    import torch

    leaf = scores.clone().requires_grad_()
    result = loss(leaf, labels, mask)
    if not (isinstance(result, tuple) and len(result) == 2):
        raise TypeError(f"returned {type(result).__name__}, expected a sum and a count")
    total, count = result
    if not (isinstance(total, torch.Tensor) and total.shape == () and total.requires_grad):
        raise TypeError("the sum is not a scalar tensor that depends on the scores")
    if int(count) != float(count):
        raise TypeError(f"the count is {float(count)}, expected a whole number")
    (gradient,) = torch.autograd.grad(total, leaf, allow_unused=True)
    if gradient is None:
        raise TypeError("the sum does not depend on the scores")
    return total.detach(), int(count), gradient


def _same(first: "tuple[Tensor, int, Tensor]", second: "tuple[Tensor, int, Tensor]") -> bool:
    import torch

    close = all(torch.allclose(first[part], second[part], rtol=1e-4, atol=1e-6) for part in (0, 2))
    return close and first[1] == second[1]


def _small_batch(loss: Loss) -> "tuple[Tensor, Tensor, Tensor]":
    """Scores, labels and mask of four groups of five documents, some of them padding; flat for pointwise data."""
    import torch

    scores = torch.linspace(0.0, 12.0, 20).sin().view(4, 5)
    if loss.reads == "teacher_score" and loss.dataset_type == "grouped":
        labels = torch.linspace(1.0, 30.0, 20).cos().view(4, 5) * 4
    else:
        labels = torch.tensor([[1.0, 0, 0, 0.5, 0], [0, 1, 0, 0, 0], [1, 0, 0.5, 0, 0], [0, 0, 1, 0, 0]])
    mask = torch.arange(5) < torch.tensor([5, 2, 3, 4]).unsqueeze(1)
    labels = labels.masked_fill(~mask, 0.0)
    if loss.dataset_type == "pointwise":
        return scores.flatten(), labels.flatten(), mask.flatten()
    return scores, labels, mask
