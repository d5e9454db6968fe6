"""An Embedder, a Retriever and a Reranker where LangChain takes embeddings, a retriever and a document compressor.

    store = InMemoryVectorStore(EmbedderEmbeddings(model="runs/e/model"))
    retriever = IndexRetriever(index="runs/index", top_k=50)
    compressor = RerankerCompressor(model="runs/a/model", top_n=5)
    ContextualCompressionRetriever(base_retriever=retriever, base_compressor=compressor)

Documents are copied before a score is written into their metadata: a store may hold the same objects.
"""

from collections.abc import Sequence
from typing import Any

from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.infer.reranker import Reranker, open_reranker
from rag_retrieval.infer.results import RerankResults
from rag_retrieval.integrations import (
    found_metadata,
    missing_library,
    open_dense_embedder,
    open_retriever,
    rerank_options,
)
from rag_retrieval.models.options import LONG_DOCUMENT_DEFAULT, OVERLAP
from rag_retrieval.retrieval.retriever import Retriever
from rag_retrieval.retrieval.searched import SearchResults

try:
    from langchain_core.callbacks import AsyncCallbackManagerForRetrieverRun, CallbackManagerForRetrieverRun, Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
    from langchain_core.embeddings import Embeddings
    from langchain_core.retrievers import BaseRetriever
    from pydantic import BaseModel, Field, PrivateAttr
except ImportError as error:
    raise missing_library("langchain-core", "langchain") from error

SCORE = "relevance_score"  # the key that LangChain's own rerankers write


class EmbedderEmbeddings(BaseModel, Embeddings):
    """Dense vectors of an Embedder, with the model's prompts for queries and documents.

    The asynchronous methods, which are LangChain's, compute in a thread. ValueError for what `Embedder` and its
    `encode` refuse, and for a model without dense vectors.
    """

    model: Any = Field(description="An Embedder, or the folder, hub name or package:NAME of one.")
    model_kwargs: dict[str, Any] | None = Field(None, description="Options of Embedder, where it is opened here.")
    batch_size: int = 256
    max_length: int | None = Field(None, description="Tokens of a document; None: the model's.")
    query_max_length: int | None = Field(None, description="Tokens of a query; None: the model's.")
    dim: int | None = Field(None, description="The first so many numbers of each vector; None: all.")
    normalize: bool | None = Field(None, description="Whether vectors get length 1; None: as the model says.")
    _embedder: Embedder = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        self._embedder = open_dense_embedder(self.model, self.model_kwargs)

    def embed_documents(self, texts: list[str]) -> list[list[float]]:
        shape = {"dim": self.dim, "normalize": self.normalize, "batch_size": self.batch_size}
        return self._embedder.encode_documents(texts, max_length=self.max_length, **shape).tolist()

    def embed_query(self, text: str) -> list[float]:
        shape = {"dim": self.dim, "normalize": self.normalize}
        return self._embedder.encode_queries([text], max_length=self.query_max_length, **shape)[0].tolist()


class IndexRetriever(BaseRetriever):
    """What a Retriever finds, best first. The score of the last stage is in `metadata["relevance_score"]`, those of
    all stages in `stage_scores`, their ranks in `stage_ranks`; the rest of the metadata is the index's.

    `invoke(query, top_k=3, where={"year": {"gte": 2020}})` takes others for one call. ValueError for what `Retriever`
    and its `search` refuse.
    """

    index: Any = Field(description="A Retriever, an Index, or the folder of one.")
    retriever_kwargs: dict[str, Any] | None = Field(None, description="Options of Retriever, where it is opened here.")
    top_k: int = Field(10, ge=1, description="Documents of a query.")
    where: dict[str, Any] | None = Field(None, description="Conditions on the metadata, as for Retriever.search.")
    _retriever: Retriever = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        self._retriever = open_retriever(self.index, self.retriever_kwargs)

    def _get_relevant_documents(
        self,
        query: str,
        *,
        run_manager: CallbackManagerForRetrieverRun,
        top_k: int | None = None,
        where: dict[str, Any] | None = None,
    ) -> list[Document]:
        return found_documents(self._retriever.search(query, *self._asked(top_k, where)))

    async def _aget_relevant_documents(
        self,
        query: str,
        *,
        run_manager: AsyncCallbackManagerForRetrieverRun,
        top_k: int | None = None,
        where: dict[str, Any] | None = None,
    ) -> list[Document]:
        return found_documents(await self._retriever.asearch(query, *self._asked(top_k, where)))

    def _asked(self, top_k: int | None, where: dict[str, Any] | None) -> tuple[int, dict[str, Any] | None]:
        return self.top_k if top_k is None else top_k, self.where if where is None else where


class RerankerCompressor(BaseDocumentCompressor):
    """Documents in the order of a Reranker's scores, best first, the score in `metadata["relevance_score"]`.

    A document without text comes last. ValueError for what `Reranker` and its `rerank` refuse.
    """

    model: Any = Field(description="A Reranker, or the folder, hub name or package:NAME of one.")
    top_n: int | None = Field(None, ge=1, description="How many documents come back; None: all.")
    batch_size: int = 256
    max_length: int | None = None
    normalize: bool = False
    long_document: str = LONG_DOCUMENT_DEFAULT
    overlap: int = OVERLAP
    _reranker: Reranker = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        self._reranker = open_reranker(self.model)

    def compress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        texts = [document.page_content for document in documents]
        results = self._reranker.rerank(query, texts, top_k=self.top_n, **rerank_options(self))
        return scored_copies(documents, results)

    async def acompress_documents(
        self, documents: Sequence[Document], query: str, callbacks: Callbacks | None = None
    ) -> list[Document]:
        texts = [document.page_content for document in documents]
        results = await self._reranker.arerank(query, texts, top_k=self.top_n, **rerank_options(self))
        return scored_copies(documents, results)


def scored_copies(documents: Sequence[Document], results: RerankResults) -> list[Document]:
    copies = []
    for result in results:
        document = documents[result.document_index]
        copies.append(document.model_copy(update={"metadata": document.metadata | {SCORE: result.score}}))
    return copies


def found_documents(results: SearchResults) -> list[Document]:
    return [
        Document(result.text, id=result.doc_id, metadata=found_metadata(result) | {SCORE: result.score})
        for result in results
    ]
