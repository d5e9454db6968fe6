"""The backend of OpenVINO: the same exported folder, read by Intel's runtime.

OpenVINO's own default computes in bfloat16 on CPUs that have it, and a score then differs by hundredths; here it
computes in float32. Nothing in this file imports torch.
"""

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rag_retrieval.infer.onnx_backend import default_threads
from rag_retrieval.infer.onnx_folder import (
    MODEL_FILE,
    Inputs,
    folder_digest,
    pair_encoder,
    read_description,
    score_padded,
)
from rag_retrieval.models.calibration import read_calibration
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.token_batch import CPU_TOKENS


class OpenVinoBackend:
    """See `rag_retrieval.infer.backend.Backend`. Each call has an inference request of its own, so several threads may
    call `score` at once."""

    def __init__(self, folder: str | os.PathLike, max_length: int | None = None, threads: int | None = None):
        """max_length, threads: as of OnnxBackend. Raises ValueError for a folder that is damaged or that OpenVINO
        cannot read, ImportError where it is not installed."""
        self._arguments = (folder, max_length, threads)
        self.folder, self.name, self.device = Path(folder), str(folder), "cpu"
        self.description = read_description(self.folder)
        self.pair_encoder = pair_encoder(self.folder, self.description, max_length)
        self.model_type = self.description.model_type
        self.calibration = read_calibration(str(self.folder))
        self._model = compile_model(self.folder / MODEL_FILE, default_threads(threads))

    def score(self, pairs: Sequence[EncodedPair], batch_size: int) -> np.ndarray:
        request = self._model.create_infer_request()

        def run(inputs: Inputs) -> np.ndarray:
            return request.infer(inputs)[0]

        names, pad = self.description.inputs, self.description.pad_token_id
        return score_padded(run, pairs, names, pad, batch_size, CPU_TOKENS)

    def describe(self) -> str:
        return f"{self.model_type} in OpenVINO, {self.pair_encoder.max_length} tokens, {self.description.precision}"

    def fingerprint(self) -> str:
        return folder_digest(self.folder, ["openvino", "cpu", self.pair_encoder.max_length])

    def close(self) -> None:
        """Nothing is held outside this process."""

    def __reduce__(self):
        """For copies and pickles, which open the folder again: a compiled model cannot be copied."""
        return OpenVinoBackend, self._arguments


def compile_model(file: Path, threads: int):
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
