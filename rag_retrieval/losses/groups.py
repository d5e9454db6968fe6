"""What the losses share: padding filled with zeros, and which documents of a group the labels put in order."""

import torch
from torch import Tensor


def fill_padding(scores: Tensor, labels: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Scores and labels in float32 with zeros at padding, and the mask itself (all True for None).

    Call it before any arithmetic, and mask the terms of the loss again after it: a nan at padding would otherwise reach
    the gradient (zero times nan is nan), and the zeros would count as predictions. Raises ValueError when the shapes
    differ: [pairs, 1] against [pairs] would broadcast to all pairs against all.
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
    """values minus the mean of their group: [groups, documents]. No gradient passes through the mean, so this is only
    for losses that depend on differences of scores; without it they would lose digits where all scores are large."""
    sizes = mask.sum(dim=1, keepdim=True).clamp(min=1)
    return values - values.detach().masked_fill(~mask, 0.0).sum(dim=1, keepdim=True) / sizes


def differences(values: Tensor) -> Tensor:
    """values_i - values_j at [group, i, j]: [groups, documents] to [groups, documents, documents]."""
    return values.unsqueeze(2) - values.unsqueeze(1)


def ordered_pairs(labels: Tensor, mask: Tensor) -> Tensor:
    """True at [group, i, j] where j has the higher label and neither is padding.

    labels, mask: [groups, documents]. Memory is groups * documents^2.
    """
    both_real = mask.unsqueeze(2) & mask.unsqueeze(1)
    return (labels.unsqueeze(2) < labels.unsqueeze(1)) & both_real


def graded(labels: Tensor, mask: Tensor) -> Tensor:
    """Which groups have documents of different labels: bool [groups].

    The losses over graded labels skip the others (a single document, too), which ask for no order, although some
    formulas would give them a value: ListNet's would ask the model for equal scores.
    """
    return ordered_pairs(labels, mask).any(dim=2).any(dim=1)
