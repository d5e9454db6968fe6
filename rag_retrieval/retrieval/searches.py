"""The searches over what a model gives for the documents of an index, opened from its parts."""

from collections.abc import Mapping
from pathlib import Path

from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.models.representations import DENSE, LEXICAL, MULTI_VECTOR
from rag_retrieval.retrieval import token_codec
from rag_retrieval.retrieval.approximate import read_faiss
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.dense import DenseSearch
from rag_retrieval.retrieval.encoding import Represent, search_device
from rag_retrieval.retrieval.lexical import LexicalSearch
from rag_retrieval.retrieval.multi_vector import CentroidSearch, MultiVectorSearch
from rag_retrieval.retrieval.vector_shards import fitted_folder, open_tokens, open_vectors, shards_of

ModelSearch = DenseSearch | LexicalSearch | MultiVectorSearch


def open_searches(
    paths: Mapping[str, Path], options: IndexOptions, represent: Represent | None, embedder: Embedder | None = None
) -> dict[str, ModelSearch]:
    """By the name of their stage. paths: of the parts of an index. represent: queries. embedder: as of
    `search_device`."""
    searches: dict[str, ModelSearch] = {}
    device = search_device(options, embedder)
    if DENSE in options.representations:
        searches[DENSE] = open_dense(paths, options, represent, device)
    if LEXICAL in options.representations:
        searches[LEXICAL] = LexicalSearch(shards_of(paths["vectors"]), represent)
    if MULTI_VECTOR in options.representations:
        first = searches.get(options.token_candidates)
        if options.has_token_lists:
            centroids = token_codec.read_centroids(fitted_folder(paths))
            first = CentroidSearch(centroids, shards_of(paths["vectors"]))
        documents = open_tokens(paths, options, device)
        factor = options.rescore_factor if first else 1
        searches[MULTI_VECTOR] = MultiVectorSearch(documents, represent, device, first, factor)
    return searches


def open_dense(
    paths: Mapping[str, Path], options: IndexOptions, represent: Represent | None, device: str
) -> DenseSearch:
    vectors, *finer = open_vectors(paths, options)
    index = read_faiss(paths["faiss"], options.faiss_search) if "faiss" in paths else None
    return DenseSearch(vectors, represent, device, *finer, index=index, factor=options.rescore_factor)
