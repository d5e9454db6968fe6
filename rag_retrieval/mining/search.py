"""Where candidates come from, as the configuration asks for it: an index of words, of vectors, or both.

The trap: models are loaded before anything is indexed, so that a wrong name is told at once and not after an hour.
Nothing of torch is imported when words alone are searched.
"""

import importlib.util
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from rag_retrieval.data.corpus import Corpus
from rag_retrieval.mining.bm25_index import Bm25Search, build_bm25
from rag_retrieval.mining.candidates import Candidates, fuse
from rag_retrieval.mining.mining_config import MiningConfig
from rag_retrieval.mining.queries import Query
from rag_retrieval.mining.work_folder import WorkFolder, content_of

BM25_LIBRARIES = ("bm25s", "Stemmer", "jieba")


class Search(Protocol):
    def search(self, queries: Sequence[Query], depth: int) -> list[Candidates]: ...


class FusedSearch:
    """Both lists to the full depth, then fused."""

    def __init__(self, searches: Sequence[Search]):
        self.searches = searches

    def search(self, queries: Sequence[Query], depth: int) -> list[Candidates]:
        found = zip(*(search.search(queries, depth) for search in self.searches), strict=True)
        return [fuse(lists, query.positives, depth) for query, lists in zip(queries, found, strict=True)]


def make_search(config: MiningConfig, corpus: Corpus, work: WorkFolder, device: str) -> Search:
    """Builds what the work folder does not have. Raises ValueError for a model or an index that cannot be."""
    if config.candidates == "bm25":
        return _words(corpus, work)
    dense = _vectors(config, corpus, work, device)
    return dense if config.candidates == "dense" else FusedSearch([_words(corpus, work), dense])


def _words(corpus: Corpus, work: WorkFolder) -> Bm25Search:
    missing = [name for name in BM25_LIBRARIES if importlib.util.find_spec(name) is None]
    if missing:
        raise ValueError(f"candidates from words need {', '.join(missing)}; run: pip install -e '.[mine]'")
    return Bm25Search(work.stage("bm25", corpus.folder.name, lambda folder: build_bm25(corpus, folder)))


def _vectors(config: MiningConfig, corpus: Corpus, work: WorkFolder, device: str) -> Search:
    from rag_retrieval.mining.dense_encoder import load_encoder
    from rag_retrieval.mining.dense_index import DenseSearch, build_vectors, open_vectors
    from rag_retrieval.mining.faiss_index import build_faiss, read_faiss

    encoder = load_encoder(config, device)
    made_from = [corpus.folder.name, model_content(config.dense_model), config.pooling]
    made_from += [config.document_prefix, config.dense_max_len, config.dense_batch_size]
    made_from += [config.similarity, config.vector_dtype]
    folder = work.stage(
        "vectors",
        made_from,
        lambda folder: build_vectors(corpus, encoder.documents, folder, config.vector_dtype),
        resumes=True,
    )
    vectors, index = open_vectors(folder), None
    if config.faiss_index is not None:
        place = work.stage(
            "faiss",
            [folder.name, config.faiss_index, config.seed],
            lambda folder: build_faiss(vectors, config.faiss_index, config.seed, folder),
        )
        index = read_faiss(place)
    return DenseSearch(vectors, encoder.queries, device, index)


def model_content(name: str) -> str:
    """What a model is told apart by: the content of its folder, or a hub's name."""
    from rag_retrieval.models.model_files import resolve_model_path

    path = Path(resolve_model_path(name))
    return content_of(path) if path.is_dir() else name
