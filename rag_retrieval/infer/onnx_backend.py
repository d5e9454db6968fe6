"""The backends of exported folders: ONNX Runtime, on the CPU or an NVIDIA GPU, and OpenVINO, on the CPU.

ONNX Runtime silently falls back to the CPU where a provider cannot be loaded; here a GPU that was asked for and is
not there is an error. Nothing in this file imports torch.
"""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rag_retrieval.core.files import content_digest, digest_of
from rag_retrieval.infer.onnx_folder import (
    DESCRIPTION_FILE,
    MODEL_FILE,
    OUTPUT,
    TOKENIZER_FILE,
    OnnxDescription,
    Run,
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

    runtime, package = "ONNX Runtime", "onnxruntime"

    def __init__(
        self,
        folder: str | os.PathLike,
        max_length: int | None = None,
        device: str = "cpu",
        threads: int | None = None,
    ):
        """max_length: tokens per pair, None for the folder's own. device: "cpu", "cuda" or "cuda:1". threads: that one
        forward uses on the CPU; None: OMP_NUM_THREADS, else the cores that this process may use.

        Raises ValueError for a folder that is damaged and a device that is not there, ImportError without the package.
        """
        self._arguments = (folder, max_length, device, threads)
        self.folder, self.name, self.device = Path(folder), str(folder), device
        self.description: OnnxDescription = read_description(self.folder)
        self.pair_encoder: PairEncoder = pair_encoder(self.folder, self.description, max_length)
        self.model_type = self.description.model_type
        self.calibration = read_calibration(str(self.folder))
        self.max_tokens = CPU_TOKENS if device == "cpu" else CUDA_TOKENS
        self._session = self._open(self.folder / MODEL_FILE, default_threads(threads))

    def _open(self, file: Path, threads: int):
        return open_session(file, self.device, threads)

    def _runner(self) -> Run:
        """Computes padded inputs, for one call of `score`."""
        return lambda inputs: self._session.run([OUTPUT], inputs)[0]

    def score(self, pairs: Sequence[EncodedPair], batch_size: int) -> np.ndarray:
        if self._session is None:
            raise ValueError(f"{self.folder} is closed; open it again")
        names, pad = self.description.inputs, self.description.pad_token_id
        return score_padded(self._runner(), pairs, names, pad, batch_size, self.max_tokens)

    def at_layer(self, layer: int) -> "OnnxBackend":
        raise ValueError(f"cutoff_layers: {self.folder} was exported with one head; leave it out")

    def describe(self) -> str:
        tokens, precision = self.pair_encoder.max_length, self.description.precision
        return f"{self.model_type} in {self.runtime}, {tokens} tokens, {precision}"

    def fingerprint(self) -> str:
        files = [*self.folder.glob(f"{MODEL_FILE}*"), self.folder / TOKENIZER_FILE, self.folder / DESCRIPTION_FILE]
        encoder = self.pair_encoder
        about = [self.package, self.device.partition(":")[0], encoder.max_length, encoder.split_special_tokens]
        return digest_of([content_digest(sorted(files)), *about])

    def close(self) -> None:
        self._session = None

    def __reduce__(self):
        """For copies and pickles, which open the folder again: a session cannot be copied."""
        return type(self), self._arguments


class OpenVinoBackend(OnnxBackend):
    """The same folder, read by Intel's runtime on the CPU.

    OpenVINO's own default computes in bfloat16 on CPUs that have it, and a score then differs by hundredths; here it
    computes in float32.
    """

    runtime, package = "OpenVINO", "openvino"

    def _open(self, file: Path, threads: int):
        try:
            import openvino
        except ImportError as error:
            raise ImportError("OpenVINO is not installed; run: pip install -e '.[openvino]'") from error
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        try:
            return openvino.Core().compile_model(str(file), "CPU", settings)
        except Exception as error:  # RuntimeError with pages of its own sources
            reason = " ".join(str(error).split())
            raise ValueError(f"{file}: OpenVINO cannot read it ({reason:.300}); use ONNX Runtime") from error

    def _runner(self) -> Run:
        request = self._session.create_infer_request()  # not shared, so that several threads may compute at once
        return lambda inputs: request.infer(inputs)[0]


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
