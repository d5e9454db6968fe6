"""Which backend a folder is opened with: ONNX Runtime or OpenVINO for an exported one, else torch.

Most options of a model are decided when it is exported. Nothing here imports torch before a folder needs it.
"""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from rag_retrieval.infer.backend import Backend
from rag_retrieval.infer.onnx_folder import DESCRIPTION_FILE
from rag_retrieval.models.options import ModelOptions

if TYPE_CHECKING:
    from rag_retrieval.models.prompts import Prompt

TAKEN = ("model_type", "max_length", "device")  # by an exported folder
FLOAT32 = (None, "fp32")


def open_backend(
    model_name_or_path: str | os.PathLike, options: ModelOptions | None = None, question: "Prompt | None" = None
) -> Backend:
    """The backend that the folder's files ask for. question: see `open_scorer`.

    Raises ValueError for a folder that is not there or holds no trained reranker, and for options that it cannot
    take; ImportError for a missing runtime.
    """
    options = options or ModelOptions()
    folder = Path(model_name_or_path).expanduser()
    if (folder / DESCRIPTION_FILE).is_file():
        return open_exported_backend(folder, options)
    from rag_retrieval.infer.torch_backend import open_torch_backend

    return open_torch_backend(model_name_or_path, options, question)


def open_exported_backend(folder: Path, options: ModelOptions) -> Backend:
    """ONNX Runtime's, or OpenVINO's where `model_type` is "openvino"."""
    check_options(folder, options)
    if options.model_type == "openvino":
        from rag_retrieval.infer.openvino_backend import OpenVinoBackend

        return OpenVinoBackend(folder, options.max_length)
    from rag_retrieval.infer.onnx_backend import OnnxBackend

    backend = OnnxBackend(folder, options.max_length, options.device or "cpu")
    if options.model_type not in (None, "onnx", backend.model_type):
        raise ValueError(
            f"{folder} was exported from a {backend.model_type}; expected model_type {backend.model_type}, onnx or "
            f"openvino, found {options.model_type!r}"
        )
    return backend


def check_options(folder: Path, options: ModelOptions) -> None:
    for name in ("precision", "dtype"):
        if getattr(options, name) not in FLOAT32:
            raise ValueError(f"{name}: {folder} is an ONNX folder, whose precision was chosen when it was exported")
    if options.model_type == "openvino" and options.device not in (None, "cpu"):
        raise ValueError(f'device: OpenVINO runs on "cpu" here, found {options.device!r}')
    for name in ModelOptions.model_fields:
        given = getattr(options, name)
        if name not in (*TAKEN, "precision", "dtype") and given not in (None, False):
            raise ValueError(f"{name}: {folder} is an ONNX folder, where it cannot be changed; leave it out")
