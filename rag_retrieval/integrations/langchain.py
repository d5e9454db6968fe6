"""`RerankerCompressor`: a Reranker where LangChain takes a document compressor.

    compressor = RerankerCompressor(model="runs/a/model", top_n=5)
    ContextualCompressionRetriever(base_retriever=retriever, base_compressor=compressor)

Documents are copied before a score is written into their metadata: a store may hold the same objects.
"""

from collections.abc import Sequence
from typing import Any

from rag_retrieval.infer.reranker import Reranker, open_reranker
from rag_retrieval.infer.results import RerankResults
from rag_retrieval.integrations import missing_library, rerank_options
from rag_retrieval.models.options import LONG_DOCUMENT_DEFAULT, OVERLAP

try:
    from langchain_core.callbacks import Callbacks
    from langchain_core.documents import BaseDocumentCompressor, Document
    from pydantic import Field, PrivateAttr
except ImportError as error:
    raise missing_library("langchain-core", "langchain") from error

SCORE = "relevance_score"  # the key that LangChain's own rerankers write


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
