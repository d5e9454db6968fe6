"""The backends of exported folders: ONNX Runtime, on the CPU or an NVIDIA GPU, and OpenVINO, on the CPU.

ONNX Runtime silently falls back to the CPU where a provider cannot be loaded; here a GPU that was asked for and is
not there is an error. Nothing in this file imports torch.
"""

import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic

import numpy as np

from rag_retrieval.core.files import content_digest, digest_of
from rag_retrieval.core.log import Progress
from rag_retrieval.infer.encoded_texts import by_text
from rag_retrieval.infer.onnx_folder import (
    MODEL_FILE,
    SCORES,
    TOKENIZER_FILE,
    Description,
    EmbedderDescription,
    Forward,
    Inputs,
    RerankerDescription,
    Run,
    check_length,
    forwards,
    padded_inputs,
    pair_encoder,
    read_description,
    read_tokenizer,
)
from rag_retrieval.models.calibration import read_calibration
from rag_retrieval.models.embedding_files import choose_settings
from rag_retrieval.models.kept_tokens import lexical_entries, tokens_with_vectors, unattended_tokens
from rag_retrieval.models.options import EmbedderOptions
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.representations import DENSE, LEXICAL
from rag_retrieval.models.text_encoding import TextEncoder
from rag_retrieval.models.token_batch import CPU_TOKENS, CUDA_TOKENS, LOGITS, TokenBatch

if TYPE_CHECKING:
    import onnxruntime

PROVIDERS = {"cpu": "CPUExecutionProvider", "cuda": "CUDAExecutionProvider"}


class OnnxRuntime:
    """A graph in ONNX Runtime. Several threads may compute at once: a session allows it."""

    name, package = "ONNX Runtime", "onnxruntime"

    def __init__(self, file: Path, device: str, threads: int):
        """Raises as `open_session`."""
        self._session = open_session(file, device, threads)

    def runner(self, outputs: Sequence[str]) -> Run:
        """Computes these outputs of padded inputs, for one caller."""
        return lambda inputs: self._session.run(outputs, inputs)


class OpenVino:
    """The same graph, read by Intel's runtime on the CPU.

    OpenVINO's own default computes in bfloat16 on CPUs that have it, and a score then differs by hundredths; here it
    computes in float32. All outputs of the graph are computed, whichever are asked for.
    """

    name, package = "OpenVINO", "openvino"

    def __init__(self, file: Path, device: str, threads: int):
        try:
            import openvino
        except ImportError as error:
            raise ImportError("OpenVINO is not installed; run: pip install -e '.[openvino]'") from error
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": "f32", "PERFORMANCE_HINT": "LATENCY"}
        try:
            self._model = openvino.Core().compile_model(str(file), "CPU", settings)
        except Exception as error:  # RuntimeError with pages of its own sources
            reason = " ".join(str(error).split())
            raise ValueError(f"{file}: OpenVINO cannot read it ({reason:.300}); use ONNX Runtime") from error

    def runner(self, outputs: Sequence[str]) -> Run:
        request = self._model.create_infer_request()  # not shared, so that several threads may compute at once

        def run(inputs: Inputs) -> list[np.ndarray]:
            found = request.infer(inputs)
            return [found[name] for name in outputs]

        return run


class OnnxFolder(Generic[Description]):
    """An exported model. Several threads may call `forwards` at once; a copy or pickle opens the folder again."""

    kind: type[Description]

    def __init__(self, folder: str | os.PathLike, device: str = "cpu", threads: int | None = None, runtime=OnnxRuntime):
        """device: "cpu", "cuda" or "cuda:1". threads: that one forward uses on the CPU; None: OMP_NUM_THREADS, else the
        cores that this process may use. runtime: `OnnxRuntime` or `OpenVino`.

        Raises ValueError for a folder that is damaged and a device that is not there, ImportError without the package.
        """
        self.folder, self.name, self.device, self.runtime = Path(folder), str(folder), device, runtime
        self.description: Description = read_description(self.folder, self.kind)
        self._graph = runtime(self.folder / MODEL_FILE, device, default_threads(threads))

    def forwards(
        self,
        texts: Sequence[EncodedPair],
        batch_size: int,
        outputs: Sequence[str],
        progress: Progress | None = None,
    ) -> Iterator[Forward]:
        """outputs: what is asked for, of `description.outputs`. batch_size: texts of one forward at most. ValueError
        after `close`."""
        graph = self._graph
        if graph is None:
            raise ValueError(f"{self.folder} is closed; open it again")
        run = graph.runner([self.description.outputs[name] for name in outputs])
        return forwards(run, self._inputs, texts, batch_size, self._max_tokens(outputs), progress)

    def _inputs(self, batch: TokenBatch) -> Inputs:
        return padded_inputs(batch, self.description.inputs, self.description.pad_token_id)

    def _max_tokens(self, outputs: Sequence[str]) -> int:
        """Of one forward, padding included."""
        return CPU_TOKENS if self.device == "cpu" else CUDA_TOKENS

    def digest(self, *about) -> str:
        """Of the files that decide on results, the runtime and the kind of device, and `about`."""
        files = [*self.folder.glob(f"{MODEL_FILE}*"), self.folder / TOKENIZER_FILE, self.folder / self.kind.file]
        return digest_of(
            [content_digest(sorted(files)), self.runtime.package, self.device.partition(":")[0], *about]
        )

    def close(self) -> None:
        """Let the model go, so that its memory is free once nothing else holds it."""
        self._graph = None

    def __reduce__(self):
        """A session cannot be copied."""
        return type(self), self._arguments


class OnnxBackend(OnnxFolder[RerankerDescription]):
    """A reranker: see `rag_retrieval.infer.backend.Backend`."""

    kind = RerankerDescription

    def __init__(
        self,
        folder: str | os.PathLike,
        max_length: int | None = None,
        device: str = "cpu",
        threads: int | None = None,
        runtime=OnnxRuntime,
    ):
        """max_length: tokens per pair, None for the folder's own; ValueError for more than were exported."""
        super().__init__(folder, device, threads, runtime)
        self._arguments = (folder, max_length, device, threads, runtime)
        self.pair_encoder = pair_encoder(self.folder, self.description, max_length)
        self.model_type = self.description.model_type
        self.calibration = read_calibration(str(self.folder))

    def score(self, pairs: Sequence[EncodedPair], batch_size: int) -> np.ndarray:
        scores = np.empty(len(pairs), np.float32)
        for forward in self.forwards(pairs, batch_size, (SCORES,)):
            (scores[forward.places],) = forward.outputs
        return scores

    def at_layer(self, layer: int) -> "OnnxBackend":
        raise ValueError(f"cutoff_layers: {self.folder} was exported with one head; leave it out")

    def describe(self) -> str:
        tokens, precision = self.pair_encoder.max_length, self.description.precision
        return f"{self.model_type} in {self.runtime.name}, {tokens} tokens, {precision}"

    def fingerprint(self) -> str:
        return self.digest(self.pair_encoder.max_length, self.pair_encoder.split_special_tokens)


class OnnxEmbedder(OnnxFolder[EmbedderDescription]):
    """An embedder: see `rag_retrieval.infer.backend.EmbedderBackend`."""

    kind = EmbedderDescription
    devices = 1

    def __init__(
        self,
        folder: str | os.PathLike,
        options: EmbedderOptions | None = None,
        threads: int | None = None,
    ):
        """options: of which prompts, lengths, normalize, device and model_type count. ValueError for lengths beyond
        what was exported."""
        options = options or EmbedderOptions()
        runtime = OpenVino if options.model_type == "openvino" else OnnxRuntime
        super().__init__(folder, options.device or "cpu", threads, runtime)
        self._arguments = (folder, options, threads)
        saved = self.description.settings
        for name, length in options.given("max_length", "query_max_length").items():
            check_length(self.folder, self.description, length, name)
        max_length = options.max_length or saved.max_length
        self.settings = choose_settings(asdict(saved), options, None, max_length, saved.bidirectional)
        prompts, limits = self.settings.prompts, self.settings.max_lengths
        template = replace(self.description.template, expanded_length=limits["query"])
        tokenizer = read_tokenizer(self.folder)
        self.text_encoder = TextEncoder(tokenizer, template, prompts, limits, self.settings.default_prompt)
        self.dim, self.limit = self.description.dim, self.description.limit

    @property
    def model(self):
        raise ValueError(f"{self.folder} is an ONNX folder, which holds no model of torch")

    def encode(
        self,
        texts: Sequence[EncodedPair],
        batch_size: int,
        outputs: Sequence[str] = (DENSE,),
        progress: Progress | None = None,
    ) -> dict[str, Sequence]:
        found: dict[str, Sequence] = {name: [None] * len(texts) for name in outputs}
        if DENSE in found:
            found[DENSE] = np.empty((len(texts), self.dim), np.float32)
        for forward in self.forwards(texts, batch_size, outputs, progress):
            for name, output in zip(outputs, forward.outputs, strict=True):
                for place, own in zip(forward.places, self._by_text(name, output, forward.batch), strict=True):
                    found[name][place] = own
        return found

    def _by_text(self, name: str, output: np.ndarray, batch: TokenBatch) -> Sequence:
        """An entry for each text of the batch. output: of the graph, without what is of padding or not kept."""
        if name == DENSE:
            return output
        if self.description.vocabulary is not None and name == LEXICAL:
            texts, ids = np.nonzero(output > 0)
            return by_text((ids, output[texts, ids]), np.bincount(texts, minlength=len(batch)))
        real = np.arange(output.shape[1]) < batch.lengths[:, None]
        if name == LEXICAL:
            entries = lexical_entries(batch, np.array(self.description.special, np.int32))
            weights = np.zeros(len(entries.ids), np.float32)
            np.maximum.at(weights, entries.entry_of_token, output[real][entries.tokens])
            return by_text((entries.ids, weights), entries.counts)
        kept = real.copy()
        kept[real] = self.kept_tokens(batch)
        return by_text((output[kept],), kept.sum(axis=1))

    def kept_tokens(self, batch: TokenBatch) -> np.ndarray:
        skiplist = np.array(self.description.skiplist, np.int32)
        return tokens_with_vectors(batch, self.settings, self.text_encoder.template, skiplist)

    def _inputs(self, batch: TokenBatch) -> Inputs:
        unattended = unattended_tokens(batch, self.settings)
        return padded_inputs(batch, self.description.inputs, self.description.pad_token_id, unattended)

    def _max_tokens(self, outputs: Sequence[str]) -> int:
        most, vocabulary = super()._max_tokens(outputs), self.description.vocabulary
        return min(most, LOGITS // vocabulary) if vocabulary is not None and LEXICAL in outputs else most

    def check_max_length(self, max_length: int) -> None:
        check_length(self.folder, self.description, max_length)

    def describe(self) -> str:
        return f"in {self.runtime.name}, {self.description.precision}"

    def fingerprint(self) -> str:
        return self.digest(asdict(self.settings))


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
