"""Losses as their mean or their sum, for tests of single values."""

from collections.abc import Callable

import torch


def reduced(function: Callable) -> Callable:
    """(scores, labels, mask, "mean" or "sum", options) to a scalar; the mean of nothing is 0."""

    def value(scores, labels, mask=None, reduction="mean", *values, **options) -> torch.Tensor:
        total, count = function(scores, labels, mask, *values, **options)
        return total if reduction == "sum" else total / count.clamp(min=1)

    return value
