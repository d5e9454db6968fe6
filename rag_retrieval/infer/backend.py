"""What computes scores for the Reranker: the interface of torch, ONNX Runtime and OpenVINO.

Nothing here imports torch, transformers or onnxruntime: an ONNX folder runs where torch is not installed.
"""

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from rag_retrieval.models.calibration import Calibration
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder


class Backend(Protocol):
    """Scores of encoded pairs. Several threads may call `score` at once; a copy or pickle is a backend too."""

    name: str  # folder or hub name of the model
    model_type: str  # "bert_encoder" or "llm_decoder"
    device: str  # such as "cpu" or "cuda:0"
    pair_encoder: PairEncoder  # texts to EncodedPair; its max_length is the model's
    calibration: Calibration | None

    def score(self, pairs: Sequence[EncodedPair], batch_size: int) -> np.ndarray:
        """Logits in input order: [pairs], float32. batch_size: pairs of one forward at most."""

    def describe(self) -> str:
        """The model in a few words, for logs."""

    def fingerprint(self) -> str:
        """A digest of everything that decides on scores: weights, settings, number formats, kind of device."""

    def close(self) -> None:
        """Give back what is held outside this process; a closed backend need not score again."""
