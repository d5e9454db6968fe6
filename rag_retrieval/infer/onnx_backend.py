"""The backend of ONNX Runtime: an exported folder on the CPU, or on an NVIDIA GPU where its package can.

ONNX Runtime silently falls back to the CPU where a provider cannot be loaded; here a GPU that was asked for and is
not there is an error. Nothing in this file imports torch.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rag_retrieval.infer.onnx_folder import (
    MODEL_FILE,
    OUTPUT,
    Inputs,
    OnnxDescription,
    folder_digest,
    pair_encoder,
    read_description,
    score_padded,
)
from rag_retrieval.models.calibration import read_calibration
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder
from rag_retrieval.models.token_batch import CPU_TOKENS, CUDA_TOKENS

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxBackend:
    """See `rag_retrieval.infer.backend.Backend`. Several threads may call `score` at once: a session allows it."""

    def __init__(
        self,
        folder: str | os.PathLike,
        max_length: int | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ):
        """max_length: tokens per pair, None for the folder's own. device: "cpu", "cuda" or "cuda:1". threads: that one
        forward uses on the CPU; None: OMP_NUM_THREADS, else the cores that this process may use.

        Raises ValueError for a folder that is damaged and a device that is not there, ImportError without onnxruntime.
        """
        self._arguments = (folder, max_length, device, threads)
        self.folder, self.name, self.device = Path(folder), str(folder), device
        self.description: OnnxDescription = read_description(self.folder)
        self.pair_encoder: PairEncoder = pair_encoder(self.folder, self.description, max_length)
        self.model_type = self.description.model_type
        self.calibration = read_calibration(str(self.folder))
        self.max_tokens = CPU_TOKENS if device == "cpu" else CUDA_TOKENS
        self._session = open_session(self.folder / MODEL_FILE, device, default_threads(threads))

    def score(self, pairs: Sequence[EncodedPair], batch_size: int) -> np.ndarray:
        names, pad = self.description.inputs, self.description.pad_token_id
        return score_padded(self._run, pairs, names, pad, batch_size, self.max_tokens)

    def describe(self) -> str:
        return f"{self.model_type} in ONNX Runtime, {self.pair_encoder.max_length} tokens, {self.description.precision}"

    def fingerprint(self) -> str:
        kind = self.device.partition(":")[0]
        return folder_digest(self.folder, ["onnxruntime", kind, self.pair_encoder.max_length])

    def close(self) -> None:
        """Nothing is held outside this process."""

    def __reduce__(self):
        """For copies and pickles, which open the folder again: a session cannot be copied."""
        return OnnxBackend, self._arguments

    def _run(self, inputs: Inputs) -> np.ndarray:
        return self._session.run([OUTPUT], inputs)[0]


def default_threads(threads: int | None) -> int:
    """Raises ValueError for less than one thread, given or in OMP_NUM_THREADS."""
    name = "threads" if threads is not None else "OMP_NUM_THREADS"
    text = str(threads) if threads is not None else os.environ.get(name, "").split(",")[0].strip()
    if not text:
        return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    if not text.isdecimal() or int(text) < 1:
        raise ValueError(f"{name} must be a whole number of at least 1, found {text!r}")
    return int(text)


def open_session(file: Path, device: str, threads: int) -> "onnxruntime.InferenceSession":
    try:
        import onnxruntime as runtime
    except ImportError as error:
        raise ImportError("an ONNX folder needs onnxruntime; run: pip install -e '.[onnx]'") from error
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.log_severity_level = 3  # warnings of its optimizer say nothing that a user could act on
    providers = [provider(runtime, device)] + ([PROVIDERS["cpu"]] if device != "cpu" else [])
    try:
        session = runtime.InferenceSession(str(file), options, providers=providers)
    except Exception as error:  # its exceptions have no common class
        raise ValueError(f"{file}: ONNX Runtime cannot open it ({error}); export the model again") from error
    if device != "cpu" and PROVIDERS["cuda"] not in session.get_providers():
        raise ValueError(f"device {device}: ONNX Runtime cannot use the GPU, it would compute on the CPU; install "
                         "CUDA and cuDNN of the versions that it was built for, or use device cpu")  # fmt: skip
    return session


def provider(runtime, device: str) -> str | tuple[str, dict[str, int]]:
    """What ONNX Runtime is asked for. Raises ValueError for a device that it does not know or that is not here."""
    kind, _, index = device.partition(":")
    if kind not in PROVIDERS or (index and not index.isdecimal()) or (kind == "cpu" and index):
        raise ValueError(f'device: an ONNX folder runs on "cpu", "cuda" or "cuda:1", found {device!r}')
    if PROVIDERS[kind] not in runtime.get_available_providers():
        raise ValueError(f"device {device}: this onnxruntime has no CUDA; install onnxruntime-gpu in its place")
    return (PROVIDERS[kind], {"device_id": int(index or 0)}) if kind == "cuda" else PROVIDERS[kind]
