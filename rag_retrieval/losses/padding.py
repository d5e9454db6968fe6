"""What all losses share: filling padding with zeros, and reducing to a scalar.

What a reader would get wrong: padding is filled before any arithmetic, and again masked out of the losses
after it. Without the first a nan at padding reaches the gradient; without the second the zeros count as
predictions.
"""

import torch
from torch import Tensor


def fill_padding(scores: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and labels in float32 with zeros at padding, and the mask itself (all True for None).

    Filling comes before any arithmetic: masking a loss that is already nan still leaves a nan gradient,
    because zero times nan is nan. Raises ValueError when the shapes differ: [pairs, 1] against [pairs] would
    broadcast to all pairs against all.
    """
    shapes = [list(tensor.shape) for tensor in (scores, labels, mask) if tensor is not None]
    if any(shape != shapes[0] for shape in shapes):
        raise ValueError(
            f"scores, labels and mask (if given) have shapes {', '.join(map(str, shapes))}; "
            "give one label and one mask entry for each score."
        )
    labels, mask = fill_label_padding(labels, mask)
    return scores.float().masked_fill(~mask, 0.0), labels, mask


def fill_label_padding(labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor]:
    """Labels in float32 with zeros at padding, and the mask itself (all True for None)."""
    if mask is None:
        mask = torch.ones_like(labels, dtype=torch.bool)
    return labels.float().masked_fill(~mask, 0.0), mask


def centred(values: Tensor, mask: Tensor) -> Tensor:
    """values minus the mean of their group: [groups, documents]. No gradient passes through the mean, so that this is
    for losses alone that see differences of scores; without it they would lose digits where all scores are large."""
    sizes = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return values - values.detach().masked_fill(~mask, 0.0).sum(dim=1, keepdim=True) / sizes


def reduce_sum(total: Tensor, count: Tensor, reduction: str) -> Tensor:
    """`total` for "sum", `total / count` for "mean"; a count of 0 leaves the total, which is then 0.

    Raises ValueError for another reduction.
    """
    if reduction == "sum":
        return total
    if reduction == "mean":
        return total / count.clamp(min=1)
    raise ValueError(f"reduction {reduction!r} is unknown; use 'mean' or 'sum'.")
