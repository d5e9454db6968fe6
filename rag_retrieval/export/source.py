"""What is exported, a reranker or an embedder: all in which their exports differ.

Both are compared over (query, document) pairs. A reranker computes a result for each pair, an embedder one for each
text: of a pair two, the query's and the document's.
"""

import logging
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rag_retrieval.export.config import ExportConfig
from rag_retrieval.export.onnx_graph import Graph, ScoreGraph, VectorGraph
from rag_retrieval.infer.onnx_backend import OnnxBackend, OnnxEmbedder, OnnxFolder
from rag_retrieval.infer.onnx_folder import EmbedderDescription, OnnxDescription, RerankerDescription
from rag_retrieval.models.calibration import write_calibration
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.embedding_heads import Projection
from rag_retrieval.models.loading import NO_LIMIT
from rag_retrieval.models.open import holds_embedder, open_embedder, open_scorer
from rag_retrieval.models.options import EmbedderOptions, ModelOptions
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.representations import DENSE
from rag_retrieval.models.settings import ModelFiles, resolve_model_path, write_settings
from rag_retrieval.models.vectors import RANGES_FILE, finish, similarity

logger = logging.getLogger(__name__)


class Source(Protocol):
    """texts_of_a_pair: results that a pair has. budget: tokens of a document at most, or of a query that may be longer.
    """

    model: PairScorer | EmbeddingModel
    texts_of_a_pair: int
    budget: int
    head: str | None  # output of the graph whose last product stays in float32 in int8

    def count(self, document: str) -> int:
        """Its tokens, of any number."""

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[EncodedPair]:
        """`texts_of_a_pair` for each pair."""

    def compared(self, results: np.ndarray) -> np.ndarray:
        """What users get of results, which has to be equal."""

    def scores(self, results: np.ndarray) -> np.ndarray:
        """[pairs], float32."""

    def graph(self) -> Graph: ...

    def open_exported(self, folder: Path) -> OnnxFolder: ...

    def write_files(self, folder: Path) -> None:
        """What lies beside graph, description, config and tokenizer."""

    def describe(self, **shared: Any) -> OnnxDescription:
        """shared: what descriptions of both kinds have."""


class RerankerSource:
    texts_of_a_pair, head = 1, RerankerDescription.output

    def __init__(self, config: ExportConfig, device: str):
        """Raises ValueError as `open_scorer`."""
        self.model = open_scorer(config.model, config.only(ModelOptions, device))
        self.encoder = self.model.pair_encoder
        self.budget = self.encoder.budget

    def count(self, document: str) -> int:
        return len(self.encoder.text_ids([document], "document")[0])

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[EncodedPair]:
        return self.encoder.encode(pairs)

    def compared(self, results: np.ndarray) -> np.ndarray:
        return results

    scores = compared

    def graph(self) -> Graph:
        return ScoreGraph(self.model)

    def open_exported(self, folder: Path) -> OnnxFolder:
        return OnnxBackend(folder)

    def write_files(self, folder: Path) -> None:
        write_settings(folder, self.model.settings)
        if self.model.calibration is not None:
            write_calibration(folder, self.model.calibration)

    def describe(self, **shared: Any) -> OnnxDescription:
        max_length = self.encoder.max_length
        kind = {"model_type": self.model.model_type, "max_length": max_length, "template": self.encoder.template}
        return RerankerDescription(**kind, **shared)


class EmbedderSource:
    texts_of_a_pair = 2

    def __init__(self, config: ExportConfig, device: str):
        """Raises ValueError as `open_embedder`, and for a model without dense vectors."""
        self.model = open_embedder(config.model, config.only(EmbedderOptions, device))
        others = [name for name in self.model.settings.representations if name != DENSE]
        if DENSE not in self.model.settings.representations:
            raise ValueError(f"{config.model}: it gives {' and '.join(others)}; dense vectors alone can be exported")
        if others:
            logger.warning("%s: its dense vectors are exported, and not %s", config.model, " and ".join(others))
            self.model.settings = replace(self.model.settings, representations=(DENSE,), lexical=None)
        self.folder = Path(resolve_model_path(config.model))
        self.encoder, self.settings = self.model.text_encoder, self.model.settings
        self.fixed = self.encoder.fixed_tokens(self.encoder.prompt_for("document"))
        self.budget = max(self.settings.max_lengths.values()) - self.fixed
        projects = any(isinstance(head, Projection) for head in self.model.heads.values())
        self.head = EmbedderDescription.output if projects else None

    def count(self, document: str) -> int:
        return len(self.encoder.encode([document], "document", max_length=NO_LIMIT)[0]) - self.fixed

    def encode(self, pairs: Sequence[tuple[str, str]]) -> list[EncodedPair]:
        queries = self.encoder.encode([query for query, _ in pairs], "query")
        documents = self.encoder.encode([document for _, document in pairs], "document")
        return [text for pair in zip(queries, documents, strict=True) for text in pair]

    def compared(self, results: np.ndarray) -> np.ndarray:
        return finish(results, normalize=self.settings.normalize)

    def scores(self, results: np.ndarray) -> np.ndarray:
        vectors, kind = self.compared(results), self.settings.similarity
        pairs = zip(vectors[0::2], vectors[1::2], strict=True)
        return np.array([similarity(query[None], document[None], kind).item() for query, document in pairs], np.float32)

    def graph(self) -> Graph:
        return VectorGraph(self.model)

    def open_exported(self, folder: Path) -> OnnxFolder:
        return OnnxEmbedder(folder)

    def write_files(self, folder: Path) -> None:
        self.model.write_settings(folder)
        if (self.folder / RANGES_FILE).is_file():
            shutil.copyfile(self.folder / RANGES_FILE, folder / RANGES_FILE)

    def describe(self, **shared: Any) -> OnnxDescription:
        kind = {"settings": self.settings, "template": self.encoder.template, "dim": self.model.dim}
        return EmbedderDescription(**kind, **shared)


def open_source(config: ExportConfig) -> Source:
    """The model on the CPU, unless the configuration names a device. An option of the other kind of model is ignored
    with a warning. Raises ValueError for a model that cannot be used."""
    files = ModelFiles(resolve_model_path(config.model))
    embeds = holds_embedder(files) or config.pooling is not None
    of_rerankers = {*ModelOptions.model_fields} - {*EmbedderOptions.model_fields} | {"model_type"}
    of_embedders = {*EmbedderOptions.model_fields} - {*ModelOptions.model_fields}
    foreign = sorted(config.model_fields_set & (of_rerankers if embeds else of_embedders))
    if foreign:
        kinds = ("an embedder", "rerankers") if embeds else ("a reranker", "embedders")
        logger.warning("%s is %s; ignored, since only for %s: %s", config.model, *kinds, ", ".join(foreign))
        config = config.model_copy(update={name: type(config).model_fields[name].default for name in foreign})
    return (EmbedderSource if embeds else RerankerSource)(config, config.device or "cpu")
