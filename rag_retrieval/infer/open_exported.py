"""The backend of an exported folder, and which of Reranker's options such a folder can take.

What a reader would get wrong: most options of a model are decided when it is exported. One that is given here and
cannot change anything is an error, not a thing to pass over.
"""

from dataclasses import fields
from pathlib import Path

from rag_retrieval.infer.backend import Backend, BackendOptions

RUNTIMES = ("onnx", "openvino")  # as model_type of an exported folder
TAKEN = ("model_type", "max_length", "device")
FLOAT32 = (None, "fp32")


def open_exported_backend(folder: Path, options: BackendOptions) -> Backend:
    """ONNX Runtime's, or OpenVINO's where `model_type` is "openvino".

    Raises ValueError for a damaged folder and for options that it cannot take, ImportError for a missing runtime.
    """
    check_options(folder, options)
    if options.model_type == "openvino":
        from rag_retrieval.infer.openvino_backend import OpenVinoBackend

        return OpenVinoBackend(folder, options.max_length)
    from rag_retrieval.infer.onnx_backend import OnnxBackend

    device = "cpu" if options.device is None else str(options.device)
    backend = OnnxBackend(folder, options.max_length, device)
    if options.model_type not in (None, "onnx", backend.model_type):
        raise ValueError(
            f"{folder} was exported from a {backend.model_type}; expected model_type {backend.model_type}, onnx or "
            f"openvino, found {options.model_type!r}"
        )
    return backend


def check_options(folder: Path, options: BackendOptions) -> None:
    for name in ("precision", "dtype"):
        if getattr(options, name) not in FLOAT32:
            raise ValueError(f"{name}: {folder} is an ONNX folder, whose precision was chosen when it was exported")
    if options.model_type == "openvino" and str(options.device) not in ("None", "cpu"):
        raise ValueError(f'device: OpenVINO runs on "cpu" here, found {options.device!r}')
    for field in fields(BackendOptions):
        given = getattr(options, field.name)
        if field.name not in (*TAKEN, "precision", "dtype") and given not in (None, False):
            raise ValueError(f"{field.name}: {folder} is an ONNX folder, where it cannot be changed; leave it out")
