"""What computes scores for the Reranker, and which one a folder is for.

What a reader would get wrong: nothing here imports torch, transformers or onnxruntime. A backend's own module does,
and it is imported when a folder asks for it, so that an ONNX folder runs where torch is not installed.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rag_retrieval.models.calibration import Calibration
from rag_retrieval.models.model_files import resolve_model_path
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder

if TYPE_CHECKING:
    import torch

ONNX_FILE = "reranker_onnx.json"


class Backend(Protocol):
    """Scores of encoded pairs, from torch, ONNX Runtime or OpenVINO. Several threads may call `score` at once."""

    model_type: str  # "bert_encoder" or "llm_decoder"
    pair_encoder: PairEncoder  # texts to EncodedPair; its max_length is the model's
    calibration: Calibration | None

    def score(self, pairs: Sequence[EncodedPair], batch_size: int) -> np.ndarray:
        """Logits in input order: [pairs], float32. batch_size: pairs of one forward at most."""

    def close(self) -> None:
        """Give back what is held outside this process; a closed backend need not score again."""


@dataclass(frozen=True)
class BackendOptions:
    """How to open a model, as `Reranker` documents it; None is the folder's or the machine's own choice."""

    model_type: str | None = None
    max_length: int | None = None
    precision: str | None = None
    dtype: "str | torch.dtype | None" = None
    device: "str | torch.device | None" = None
    devices: "Sequence[str | torch.device] | None" = None
    trust_remote_code: bool = False
    query_format: str | None = None
    document_format: str | None = None
    seq: str | None = None
    special_token: str | None = None
    head: str | None = None
    instruction: str | None = None
    yes_token: str | None = None
    no_token: str | None = None


def open_backend(model_name_or_path: str | os.PathLike, options: BackendOptions) -> Backend:
    """The backend that the folder's files ask for.

    Raises ValueError for a folder that is not there or holds no reranker, and for options that it cannot take.
    """
    folder = Path(model_name_or_path).expanduser()
    if (folder / ONNX_FILE).is_file():
        from rag_retrieval.infer.open_exported import open_exported_backend

        return open_exported_backend(folder, options)
    from rag_retrieval.infer.torch_backend import open_torch_backend

    return open_torch_backend(resolve_model_path(model_name_or_path), options)
