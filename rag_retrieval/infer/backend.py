"""What computes for Reranker and Embedder: torch, ONNX Runtime or OpenVINO, and which of them a folder is opened with.

Most options of a model are decided when it is exported. Nothing here imports torch, transformers or onnxruntime before
a folder needs it: an ONNX folder runs where torch is not installed.
"""

import logging
import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import numpy as np

from rag_retrieval.core.log import Progress
from rag_retrieval.infer.onnx_folder import EmbedderDescription, RerankerDescription, holds
from rag_retrieval.models.calibration import Calibration
from rag_retrieval.models.embedding_files import EmbedderSettings
from rag_retrieval.models.options import EmbedderOptions, ModelOptions, OpeningOptions
from rag_retrieval.models.pair_encoding import EncodedPair, PairEncoder
from rag_retrieval.models.representations import DENSE
from rag_retrieval.models.settings import ModelFiles, resolve_model_path
from rag_retrieval.models.text_encoding import TextEncoder
from rag_retrieval.models.token_batch import TokenBatch

if TYPE_CHECKING:
    from rag_retrieval.models.embedder import EmbeddingModel
    from rag_retrieval.models.prompts import Prompt

logger = logging.getLogger(__name__)

# that an exported folder takes; the other options were decided when it was exported
EXPORTED_OPTIONS = ("model_type", "max_length", "device", "query_max_length", "prompts", "normalize")
FLOAT32 = (None, "fp32")


class Backend(Protocol):
    """Scores of encoded pairs. Several threads may call `score` at once; a copy or pickle is a backend too."""

    name: str  # folder or hub name of the model
    model_type: str  # "bert_encoder", "llm_decoder", or "multi_vector" for token vectors
    device: str  # such as "cpu" or "cuda:0"
    pair_encoder: PairEncoder  # texts to EncodedPair; its max_length is the model's
    calibration: Calibration | None

    def score(self, pairs: Sequence[EncodedPair], batch_size: int) -> np.ndarray:
        """Logits in input order: [pairs], float32. batch_size: pairs of one forward at most."""

    def at_layer(self, layer: int) -> "Backend":
        """The same model up to a layer that has a head, with that head. Raises ValueError where it has none."""

    def describe(self) -> str:
        """The model in a few words, for logs."""

    def fingerprint(self) -> str:
        """A digest of everything that decides on scores: weights, settings, number formats, kind of device."""

    def close(self) -> None:
        """Let the model go, so that its memory is free once nothing else holds it; scoring then raises ValueError."""


class EmbedderBackend(Protocol):
    """Representations of encoded texts. Several threads may call `encode` at once; a copy or pickle is one too."""

    name: str  # folder or hub name of the model
    model: "EmbeddingModel"  # of torch; ValueError for an exported folder, which has none
    settings: EmbedderSettings
    text_encoder: TextEncoder  # texts to EncodedPair
    dim: int  # numbers of a dense vector
    devices: int  # that compute at once
    device: str  # such as "cpu" or "cuda:0"; of several the first
    limit: int | None  # tokens of a text at most that the model takes; None for no limit

    def encode(
        self,
        texts: Sequence[EncodedPair],
        batch_size: int,
        outputs: Sequence[str] = (DENSE,),
        progress: Progress | None = None,
    ) -> dict[str, Sequence]:
        """Of each of `outputs`, in this order, one entry for each text in input order: dense, a row of [texts, dim],
        float32, not normalized; lexical, ids and weights, see `Weights`; multi_vector, an array [tokens, width],
        float32. outputs: of `settings.representations`. batch_size: texts of one forward at most."""

    def kept_tokens(self, batch: TokenBatch) -> np.ndarray:
        """[tokens], bool: which of the batch's tokens have a token vector."""

    def check_max_length(self, max_length: int) -> None:
        """Raises ValueError for more tokens of a text than the model takes."""

    def describe(self) -> str:
        """How it computes, in a few words, for logs."""

    def fingerprint(self) -> str:
        """A digest of everything that decides on vectors: weights, prompts, lengths, number formats, kind of device."""

    def close(self) -> None:
        """Let the model go, so that its memory is free once nothing else holds it; `encode` then raises ValueError."""


def open_backend(
    model_name_or_path: str | os.PathLike, options: ModelOptions | None = None, question: "Prompt | None" = None
) -> Backend:
    """The backend that the folder's files ask for. question: see `open_scorer`.

    Raises ValueError for a folder that is not there or holds no trained reranker, and for options that it cannot
    take; ImportError for a missing runtime.
    """
    options = options or ModelOptions()
    folder = Path(model_name_or_path).expanduser()
    if holds(folder, RerankerDescription):
        return open_exported_backend(folder, options)
    if is_exported(folder):
        return open_token_vector_backend(folder, options)
    from rag_retrieval.infer.torch_backend import open_torch_backend
    from rag_retrieval.models.open import holds_token_vectors

    if holds_token_vectors(ModelFiles(resolve_model_path(model_name_or_path))):
        return open_token_vector_backend(model_name_or_path, options)
    return open_torch_backend(model_name_or_path, options, question)


def open_exported_backend(folder: Path, options: ModelOptions) -> Backend:
    """ONNX Runtime's, or OpenVINO's where `model_type` is "openvino"."""
    check_options(folder, options)
    from rag_retrieval.infer.onnx_backend import OnnxBackend, OpenVino

    if options.model_type == "openvino":
        return OnnxBackend(folder, options.max_length, runtime=OpenVino)
    backend = OnnxBackend(folder, options.max_length, options.device or "cpu")
    if options.model_type not in (None, "onnx", backend.model_type):
        raise ValueError(
            f"{folder} was exported from a {backend.model_type}; expected model_type {backend.model_type}, onnx or "
            f"openvino, found {options.model_type!r}"
        )
    return backend


def open_token_vector_backend(model_name_or_path: str | os.PathLike, options: ModelOptions) -> Backend:
    """Raises ValueError as `open_embedder_backend`, and for a model without token vectors. Options of models that read
    both texts together are ignored with a warning."""
    from rag_retrieval.infer.token_vector_backend import TokenVectorBackend

    own = options.embedder_options()
    foreign = [name for name in options.given(*ModelOptions.model_fields) if getattr(own, name, None) is None]
    if foreign:
        names = ", ".join(foreign)
        logger.warning("%s ranks by token vectors; ignored, since not for these: %s", model_name_or_path, names)
    return TokenVectorBackend(open_embedder_backend(model_name_or_path, own))


def open_embedder_backend(
    model_name_or_path: str | os.PathLike, options: EmbedderOptions | None = None
) -> EmbedderBackend:
    """Raises ValueError for a folder that is not there or holds no embedder, and for options that it cannot take;
    ImportError for a missing runtime."""
    options = options or EmbedderOptions()
    folder = Path(model_name_or_path).expanduser()
    if is_exported(folder):
        check_options(folder, options)
        from rag_retrieval.infer.onnx_backend import OnnxEmbedder

        return OnnxEmbedder(folder, options)
    from rag_retrieval.infer.torch_backend import open_torch_embedder

    return open_torch_embedder(model_name_or_path, options)


def is_exported(name: str | os.PathLike) -> bool:
    """Whether it is the folder of an exported embedder."""
    return holds(Path(name).expanduser(), EmbedderDescription)


def check_options(folder: Path, options: OpeningOptions) -> None:
    """Raises ValueError for an option that an exported folder cannot take."""
    for name in ("precision", "dtype"):
        if getattr(options, name) not in FLOAT32:
            raise ValueError(f"{name}: {folder} is an ONNX folder, whose precision was chosen when it was exported")
    if options.model_type == "openvino" and options.device not in (None, "cpu"):
        raise ValueError(f'device: OpenVINO runs on "cpu" here, found {options.device!r}')
    for name, field in type(options).model_fields.items():
        if name not in (*EXPORTED_OPTIONS, "precision", "dtype") and getattr(options, name) != field.default:
            raise ValueError(f"{name}: {folder} is an ONNX folder, where it cannot be changed; leave it out")
