"""The search that a configuration asks for: by words, by vectors, or both fused, over what a work folder keeps.

torch is not imported where words alone are searched.
"""

import importlib.util
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rag_retrieval.core.files import WorkFolder
from rag_retrieval.data.corpus import Corpus
from rag_retrieval.data.words import AUTO, WORDS_VERSION
from rag_retrieval.retrieval.bm25 import Bm25Search, build_bm25
from rag_retrieval.retrieval.candidates import Search
from rag_retrieval.retrieval.fusion import FusedSearch, Fusion

BM25_LIBRARIES = ("bm25s", "Stemmer", "jieba")


@dataclass(frozen=True)
class DenseEncoder:
    """queries, documents: texts to vectors, float32 [texts, width]. made_from: what decides on those of documents, as
    JSON values. device: where vectors are compared."""

    queries: Callable[[list[str]], np.ndarray]
    documents: Callable[[list[str]], np.ndarray]
    made_from: dict[str, Any]
    device: str


@dataclass(frozen=True)
class SearchOptions:
    """candidates: bm25, dense, or fused (both by reciprocal rank). encoder: for dense and fused. vector_dtype:
    float16 or float32, on disk. faiss_index: a factory string of FAISS; None searches exactly. seed: of the sample
    that FAISS trains on. language: of the words of bm25, see `words.tokenize`.
    """

    candidates: Literal["bm25", "dense", "fused"]
    encoder: DenseEncoder | None = None
    vector_dtype: Literal["float16", "float32"] = "float16"
    faiss_index: str | None = None
    seed: int = 0
    language: str = AUTO


def make_search(options: SearchOptions, corpus: Corpus, work: WorkFolder) -> Search:
    """Builds what the work folder does not have. Raises ValueError for an index that cannot be."""
    if options.candidates == "bm25":
        return _words(options, corpus, work)
    dense = _vectors(options, corpus, work)
    if options.candidates == "dense":
        return dense
    return FusedSearch({"bm25": _words(options, corpus, work), "dense": dense}, Fusion())


def _words(options: SearchOptions, corpus: Corpus, work: WorkFolder) -> Bm25Search:
    missing = [name for name in BM25_LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"candidates from words need {', '.join(missing)}; run: pip install -e '.[mine]'")
    made_from = [corpus.folder.name, WORDS_VERSION, options.language]
    return Bm25Search(work.stage("bm25", made_from, lambda folder: build_bm25(corpus, folder, options.language)))


def _vectors(options: SearchOptions, corpus: Corpus, work: WorkFolder) -> Search:
    from rag_retrieval.retrieval.dense import DenseSearch, build_faiss, build_vectors, open_vectors, read_faiss

    encoder = options.encoder
    folder = work.stage(
        "vectors",
        [corpus.folder.name, encoder.made_from, options.vector_dtype],
        lambda folder: build_vectors(corpus, encoder.documents, folder, options.vector_dtype),
        resumes=True,
    )
    vectors, index = open_vectors(folder), None
    if options.faiss_index is not None:
        place = work.stage(
            "faiss",
            [folder.name, options.faiss_index, options.seed],
            lambda folder: build_faiss(vectors, options.faiss_index, options.seed, folder),
        )
        index = read_faiss(place)
    return DenseSearch(vectors, encoder.queries, encoder.device, index)
