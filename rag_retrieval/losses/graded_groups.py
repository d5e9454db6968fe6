"""What the losses over graded labels share: which groups have an order to teach, and how many they are.

What a reader would get wrong: a group whose labels are all equal (a single document, too) asks for no order. The
graded losses skip it, and their mean does not count it, although some formulas would give it a value: ListNet's
would ask the model for equal scores.
"""

from torch import Tensor

from rag_retrieval.losses.padding import fill_label_padding


def ordered_pairs(labels: Tensor, mask: Tensor) -> Tensor:
    """True at [group, i, j] where j has the higher label and neither is padding.

    labels, mask: [groups, documents]. Memory is groups * documents^2.
    """
    both_real = mask.unsqueeze(2) & mask.unsqueeze(1)
    return (labels.unsqueeze(2) < labels.unsqueeze(1)) & both_real


def differences(values: Tensor) -> Tensor:
    """values_i - values_j at [group, i, j]: [groups, documents] to [groups, documents, documents]."""
    return values.unsqueeze(2) - values.unsqueeze(1)


def graded(labels: Tensor, mask: Tensor) -> Tensor:
    """Which groups have documents of different labels: bool [groups]."""
    return ordered_pairs(labels, mask).any(dim=2).any(dim=1)


def count_graded_groups(labels: Tensor, mask: Tensor | None = None) -> int:
    """Number of groups with documents of different labels: what the mean of most graded losses divides by.

    labels, mask: [groups, documents]. Call it on CPU tensors: on a GPU it waits for the device.
    """
    return int(graded(*fill_label_padding(labels, mask)).sum())


def count_graded_documents(labels: Tensor, mask: Tensor | None = None) -> int:
    """Number of documents in such groups; otherwise as `count_graded_groups`."""
    labels, mask = fill_label_padding(labels, mask)
    return int((mask & graded(labels, mask).unsqueeze(1)).sum())
