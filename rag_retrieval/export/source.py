"""What is exported, a reranker or an embedder: all in which their exports differ.

Both are compared over (query, document) pairs. A reranker computes a score for each pair, an embedder what represents
each text: of a pair two, the query and the document.
"""

import logging
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from rag_retrieval.core.log import Progress
from rag_retrieval.export.config import ExportConfig
from rag_retrieval.export.onnx_graph import EmbedderGraph, Graph, ScoreGraph
from rag_retrieval.infer.backend import EmbedderBackend
from rag_retrieval.infer.onnx_backend import OnnxBackend, OnnxEmbedder
from rag_retrieval.infer.onnx_folder import (
    SCORES,
    EmbedderDescription,
    OnnxDescription,
    RerankerDescription,
    output_names,
)
from rag_retrieval.infer.torch_backend import TorchEmbedder
from rag_retrieval.models.calibration import CALIBRATION_FILE, write_calibration
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.embedding_heads import Projection
from rag_retrieval.models.loading import NO_LIMIT
from rag_retrieval.models.matching import lexical_score, maxsim
from rag_retrieval.models.open import holds_embedder, open_embedder, open_scorer
from rag_retrieval.models.options import EmbedderOptions, ModelOptions
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.representation_files import SPLADE
from rag_retrieval.models.representations import DENSE, LEXICAL
from rag_retrieval.models.scoring import run_encoded
from rag_retrieval.models.settings import ModelFiles, resolve_model_path, write_settings
from rag_retrieval.models.vectors import RANGES_FILE, finish, similarity

logger = logging.getLogger(__name__)


Results = dict[str, Sequence]  # "scores", or by representation: an entry for each text, as an `EmbedderBackend` has it
Compute = Callable[[Sequence[EncodedPair]], Results]
BATCH_SIZE = 256  # texts of one forward at most, while comparing


class Source(Protocol):
    """texts_of_a_pair: results that a pair has: 1 of a reranker; 2 of an embedder, whose source has `encode_kind` and
    `search_scores` besides. budget: tokens of a document at most, or of a query that may be longer."""

    model: PairScorer | EmbeddingModel
    texts_of_a_pair: int
    budget: int
    heads: Sequence[str]  # outputs of the graph whose last products stay in float32 in int8

    def count(self, document: str) -> int:
        """Its tokens, of any number."""

    def encode(self, pairs: Sequence[tuple[str, str]], alike: bool = False) -> list[EncodedPair]:
        """`texts_of_a_pair` for each pair. alike: an embedder encodes both neither as a query nor as a document."""

    def results(self, texts: Sequence[EncodedPair], progress: Progress) -> Results:
        """Of the model, as users get them."""

    def open_exported(self, folder: Path) -> Compute:
        """The same of the exported folder."""

    def scores(self, results: Results) -> dict[str, np.ndarray]:
        """Of the pairs that the texts are, by the kind of result: [pairs], float32."""

    def graph(self) -> Graph: ...

    def write_files(self, folder: Path) -> None:
        """What lies beside graph, description, config and tokenizer."""

    def describe(self, **shared: Any) -> OnnxDescription:
        """shared: what descriptions of both kinds have."""


class RerankerSource:
    texts_of_a_pair, heads = 1, (SCORES,)

    def __init__(self, config: ExportConfig, device: str):
        """Raises ValueError as `open_scorer`."""
        self.model = open_scorer(config.model, config.only(ModelOptions, device))
        self.encoder = self.model.pair_encoder
        self.budget = self.encoder.budget

    def count(self, document: str) -> int:
        return len(self.encoder.text_ids([document], "document")[0])

    def encode(self, pairs: Sequence[tuple[str, str]], alike: bool = False) -> list[EncodedPair]:
        return self.encoder.encode(pairs)

    def results(self, texts: Sequence[EncodedPair], progress: Progress) -> Results:
        return {SCORES: run_encoded([self.model], texts, BATCH_SIZE, "no", progress).numpy()}

    def open_exported(self, folder: Path) -> Compute:
        backend = OnnxBackend(folder)
        return lambda texts: {SCORES: backend.score(texts, BATCH_SIZE)}

    def scores(self, results: Results) -> dict[str, np.ndarray]:
        return results

    def graph(self) -> Graph:
        return ScoreGraph(self.model)

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
        """Raises ValueError as `open_embedder`."""
        self.model = open_embedder(config.model, config.only(EmbedderOptions, device))
        self.folder = Path(resolve_model_path(config.model))
        self.encoder, self.settings = self.model.text_encoder, self.model.settings
        self.fixed = self.encoder.fixed_tokens(self.encoder.prompt_for("document"))
        self.budget = max(self.settings.max_lengths.values()) - self.fixed
        projects = any(isinstance(head, Projection) for head in self.model.heads.values())
        names = output_names(self.settings)
        self.heads = [output for name, output in names.items() if name != DENSE or projects]

    def count(self, document: str) -> int:
        return len(self.encoder.encode([document], "document", max_length=NO_LIMIT)[0]) - self.fixed

    def encode(self, pairs: Sequence[tuple[str, str]], alike: bool = False) -> list[EncodedPair]:
        queries = self.encode_kind([query for query, _ in pairs], None if alike else "query")
        documents = self.encode_kind([document for _, document in pairs], None if alike else "document")
        return [text for pair in zip(queries, documents, strict=True) for text in pair]

    def encode_kind(self, texts: Sequence[str], kind: str | None) -> list[EncodedPair]:
        """kind: as of `Embedder.encode`."""
        return self.encoder.encode(texts, kind)

    def results(self, texts: Sequence[EncodedPair], progress: Progress) -> Results:
        return self._computed(TorchEmbedder(self.model, "no"), texts, progress)

    def open_exported(self, folder: Path) -> Compute:
        backend = OnnxEmbedder(folder)
        return lambda texts: self._computed(backend, texts)

    def _computed(
        self, backend: EmbedderBackend, texts: Sequence[EncodedPair], progress: Progress | None = None
    ) -> Results:
        found = backend.encode(texts, BATCH_SIZE, self.settings.representations, progress)
        return found | ({DENSE: finish(found[DENSE], normalize=self.settings.normalize)} if DENSE in found else {})

    def scores(self, results: Results) -> dict[str, np.ndarray]:
        sides = {name: comparable(name, of) for name, of in results.items()}
        return {
            name: np.array([self._score(name, *pair) for pair in zip(of[0::2], of[1::2], strict=True)], np.float32)
            for name, of in sides.items()
        }

    def search_scores(self, queries: Results, documents: Results) -> dict[str, np.ndarray]:
        """Of each query with each document, by representation: float32 [queries, documents]."""
        found = {}
        for name in queries:
            left, right = comparable(name, queries[name]), comparable(name, documents[name])
            if name == DENSE:
                found[name] = similarity(left, right, self.settings.similarity)
            else:
                rows = [[self._score(name, query, document) for document in right] for query in left]
                found[name] = np.array(rows, np.float32)
        return found

    def _score(self, name: str, query: Any, document: Any) -> float:
        if name == DENSE:
            return similarity(query[None], document[None], self.settings.similarity).item()
        if name == LEXICAL:
            return lexical_score(query, document)
        return maxsim(query, document, self.settings.multi_vector_mean)

    def graph(self) -> Graph:
        return EmbedderGraph(self.model)

    def write_files(self, folder: Path) -> None:
        self.model.write_settings(folder)
        for name in (RANGES_FILE, CALIBRATION_FILE):  # the second where it ranks by token vectors
            if (self.folder / name).is_file():
                shutil.copyfile(self.folder / name, folder / name)

    def describe(self, **shared: Any) -> OnnxDescription:
        model = self.model
        output_layer = model.model.get_output_embeddings() if self.settings.lexical == SPLADE else None
        return EmbedderDescription(
            settings=self.settings,
            template=self.encoder.template,
            dim=model.dim,
            special=tuple(model.special_ids.tolist()),
            skiplist=tuple(model.skiplist.tolist()),
            vocabulary=None if output_layer is None else len(output_layer.weight),
            **shared,
        )


def comparable(name: str, results: Sequence) -> Sequence:
    """Lexical weights by token id; other representations as they are."""
    return [dict(zip(*map(np.ndarray.tolist, text), strict=True)) for text in results] if name == LEXICAL else results


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
