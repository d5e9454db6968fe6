"""Arrays where they are computed with: numpy's on the CPU, so that an exported model is searched by without torch, and
torch's on other devices."""

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import torch

    Array = np.ndarray | torch.Tensor


def on_device(values: np.ndarray, device: "str | torch.device") -> "Array":
    if str(device) == "cpu":
        return values
    import torch

    return torch.from_numpy(np.ascontiguousarray(values)).to(device)


def on_host(values: "Array") -> np.ndarray:
    return values if isinstance(values, np.ndarray) else values.cpu().numpy()


def largest(values: "Array") -> "Array":
    """Of each column: [rows, columns] to [columns]."""
    return values.max(axis=0) if isinstance(values, np.ndarray) else values.amax(dim=0)
