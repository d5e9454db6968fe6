"""Scores as probabilities: by a temperature and a bias from a file beside the weights, or by the sigmoid.

The file belongs to these weights alone. It is not part of the model's settings, so a model that is trained further is
saved without it, and `save_pretrained` removes an older one from the folder.
"""

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import numpy as np

from rag_retrieval.core.files import write_text
from rag_retrieval.models.settings import find_file, parsing

if TYPE_CHECKING:
    import torch

CALIBRATION_FILE = "calibration.json"


@dataclass(frozen=True)
class Calibration:
    """probability = sigmoid(score / temperature + bias). temperature: above 0.

    data, pairs: what it was fitted on. It holds for candidates found as those were, since their share of relevant
    documents is part of it.
    """

    temperature: float
    bias: float
    data: str
    pairs: int


def sigmoid(scores: "torch.Tensor | np.ndarray") -> "torch.Tensor | np.ndarray":
    """1 / (1 + exp(-score)) of a tensor or an array, without overflow at either end."""
    if not isinstance(scores, np.ndarray):
        return scores.sigmoid()
    small = np.exp(-np.abs(scores))
    return np.where(scores >= 0, 1, small) / (1 + small)


@dataclass(frozen=True)
class Probabilities:
    """values: of the shape and type of the scores, in [0, 1]. calibration: what they were made with; None for the plain
    sigmoid, which is no probability after RankNet or listwise training."""

    values: "torch.Tensor | np.ndarray"
    calibration: Calibration | None

    @property
    def calibrated(self) -> bool:
        return self.calibration is not None

    @property
    def score_type(self) -> Literal["calibrated", "sigmoid"]:
        return "calibrated" if self.calibrated else "sigmoid"


def probabilities_of(scores: "torch.Tensor | np.ndarray", calibration: Calibration | None) -> Probabilities:
    """What `normalize` means everywhere: calibrated where the model has a calibration, else the sigmoid. It is for
    showing only: equal probabilities of high scores would lose the ranking."""
    logits = scores if calibration is None else scores / calibration.temperature + calibration.bias
    return Probabilities(sigmoid(logits), calibration)


def read_calibration(model_path: str) -> Calibration | None:
    """What was saved beside a model, from a folder or the hub; None without. ValueError for a damaged file."""
    path = find_file(model_path, CALIBRATION_FILE)
    if path is None:
        return None
    with parsing(path, "delete it or calibrate again"):
        calibration = Calibration(**json.loads(path.read_text(encoding="utf-8")))
        temperature, bias = calibration.temperature, calibration.bias
        if not (temperature > 0 and math.isfinite(temperature) and math.isfinite(bias)):
            raise ValueError(f"temperature {temperature} and bias {bias}; expected a positive and a finite number")
    return calibration


def write_calibration(folder: Path, calibration: Calibration) -> None:
    """Beside the weights in `folder`, whole or not at all."""
    write_text(folder / CALIBRATION_FILE, json.dumps(asdict(calibration), ensure_ascii=False, indent=2) + "\n")
