"""An Embedder, a Retriever and a Reranker where LlamaIndex takes an embedding model, a retriever and a postprocessor.

    index = VectorStoreIndex.from_documents(documents, embed_model=EmbedderEmbedding(model="runs/e/model"))
    index.as_query_engine(node_postprocessors=[RerankerPostprocessor(model="runs/a/model", top_n=5)])
    RetrieverQueryEngine(IndexRetriever("runs/index"), response_synthesizer)

LlamaIndex puts a node's metadata before its text for embedding models and rerankers alike, and so does this. A
reranker that was trained on bare passages wants metadata_mode=MetadataMode.NONE; for embedding, a document's
`excluded_embed_metadata_keys` leaves them out.
"""

import asyncio
import os
from typing import Any

from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.infer.reranker import Reranker, open_reranker
from rag_retrieval.integrations import (
    COMPARED,
    STAGE_RANKS,
    STAGE_SCORES,
    all_of,
    condition_on,
    found_metadata,
    missing_library,
    named_errors,
    open_dense_embedder,
    open_retriever,
    rerank_options,
)
from rag_retrieval.models.options import LONG_DOCUMENT_DEFAULT, OVERLAP
from rag_retrieval.retrieval.filters import AND, LIST, NOT, ONE, OR, FilterError, Filters
from rag_retrieval.retrieval.index import Index
from rag_retrieval.retrieval.retriever import Retriever
from rag_retrieval.retrieval.searched import SearchResults

try:
    from llama_index.core.base.embeddings.base import BaseEmbedding
    from llama_index.core.bridge.pydantic import Field, PrivateAttr
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.retrievers import BaseRetriever
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle, TextNode
    from llama_index.core.vector_stores import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
except ImportError as error:
    raise missing_library("llama-index-core", "llama-index") from error

dispatcher = get_dispatcher(__name__)

OF_LISTS = {  # of fields that hold lists, of which one element is compared
    FilterOperator.CONTAINS: COMPARED["=="],
    FilterOperator.ANY: COMPARED["in"],
}


class EmbedderEmbedding(BaseEmbedding):
    """Dense vectors of an Embedder, with the model's prompts for queries and documents.

    The asynchronous methods compute in a thread. ValueError for what `Embedder` and its `encode` refuse, and for a
    model without dense vectors.
    """

    model: Any = Field(description="An Embedder, or the folder, hub name or package:NAME of one.")
    model_kwargs: dict[str, Any] | None = Field(None, description="Options of Embedder, where it is opened here.")
    embed_batch_size: int = Field(256, gt=0, le=2048, description="Texts that are encoded together.")
    max_length: int | None = Field(None, description="Tokens of a document; None: the model's.")
    query_max_length: int | None = Field(None, description="Tokens of a query; None: the model's.")
    dim: int | None = Field(None, description="The first so many numbers of each vector; None: all.")
    normalize: bool | None = Field(None, description="Whether vectors get length 1; None: as the model says.")
    _embedder: Embedder = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        self._embedder = open_dense_embedder(self.model, self.model_kwargs)
        self.model_name = self._embedder.backend.name if isinstance(self.model, Embedder) else str(self.model)

    @classmethod
    def class_name(cls) -> str:
        return "EmbedderEmbedding"

    def _get_query_embedding(self, query: str) -> list[float]:
        shape = {"dim": self.dim, "normalize": self.normalize}
        return self._embedder.encode_queries([query], max_length=self.query_max_length, **shape)[0].tolist()

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        shape = {"dim": self.dim, "normalize": self.normalize, "batch_size": self.embed_batch_size}
        return self._embedder.encode_documents(texts, max_length=self.max_length, **shape).tolist()

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._get_text_embeddings([text])[0]

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return await asyncio.to_thread(self._get_query_embedding, query)

    async def _aget_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return await asyncio.to_thread(self._get_text_embeddings, texts)

    async def _aget_text_embedding(self, text: str) -> list[float]:
        return await asyncio.to_thread(self._get_text_embedding, text)


class IndexRetriever(BaseRetriever):
    """What a Retriever finds, best first, each node with the score of the last stage.

    index: a Retriever, an Index, or the folder of one. top_k: nodes of a query. where: conditions on the metadata, as
    for `Retriever.search`. retriever_kwargs: options of Retriever, where it is opened here. filters: LlamaIndex's own,
    which hold besides `where`; see `where_of`. Further options are LlamaIndex's. A node's metadata are the
    index's; scores and ranks of all stages, in `stage_scores` and `stage_ranks`, are kept from language models and
    rerankers. ValueError for what `Retriever` and `search` refuse.
    """

    def __init__(
        self,
        index: Retriever | Index | str | os.PathLike,
        top_k: int = 10,
        where: dict[str, Any] | None = None,
        retriever_kwargs: dict[str, Any] | None = None,
        filters: MetadataFilters | None = None,
        **options: Any,
    ):
        super().__init__(**options)
        self._retriever = open_retriever(index, retriever_kwargs)
        self._top_k, self._where, self._filters = top_k, where, filters

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        own = where_of(self._filters, self._retriever.index.opened.filters) if self._filters else None
        return found_nodes(self._retriever.search(query_bundle.query_str, self._top_k, all_of(self._where, own)))

    async def _aretrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        return await asyncio.to_thread(self._retrieve, query_bundle)


def where_of(filters: MetadataFilters, documents: Filters) -> dict[str, Any]:
    """LlamaIndex's filters as `where` that holds for the same of these documents, as its store in memory compares them;
    {} for no filter. Groups may stand in groups; NOT is for none of its filters.

    Raises FilterError, with field and operator, for what `Filters.rows` refuses, for the operators of substrings, and
    where LlamaIndex compares in another way than `where`: names with a point, values of several kinds, and lists where
    it wants values or the reverse. The latter also depends on the documents.
    """
    if not filters.filters:
        return {}
    members = []
    for one in filters.filters:
        if isinstance(one, MetadataFilters):
            members.append(where_of(one, documents))
        else:
            with named_errors(f"{one.key} {one.operator.value}"):
                members.append(compared(one, documents))
    if {} in members:
        raise FilterError("filters: expected at least one filter in each group, found none")
    if filters.condition == FilterCondition.NOT:
        return {NOT: {OR: members}}
    return {OR if filters.condition == FilterCondition.OR else AND: members}


def compared(one: MetadataFilter, documents: Filters) -> dict[str, Any]:
    field, value = one.key, one.value
    if "." in field:
        raise FilterError("where reads a name with a point as a field inside an object; use where")
    if one.operator == FilterOperator.IS_EMPTY:
        if documents.column(field).values[str][:1] == [""]:  # in a list it does not make the list empty
            return condition_on(documents, field, {"in": [None, ""]})
        return condition_on(documents, field, {"in": [None]}, {ONE, LIST})
    if value is None:
        raise FilterError(f"expected a value, found none; {FilterOperator.IS_EMPTY.value} is for documents without one")
    if one.operator == FilterOperator.NIN:
        return {NOT: condition_on(documents, field, COMPARED["in"](value))}
    if one.operator.value in COMPARED:
        return condition_on(documents, field, COMPARED[one.operator.value](value))
    if one.operator in OF_LISTS:
        return condition_on(documents, field, OF_LISTS[one.operator](value), {LIST})
    if one.operator == FilterOperator.ALL and isinstance(value, list) and value:
        return {AND: [condition_on(documents, field, {"in": [each]}, {LIST}) for each in value]}
    if one.operator == FilterOperator.ALL:
        raise FilterError(f"expected a list of values, found {value!r:.100}")
    others = (FilterOperator.NIN, *OF_LISTS, FilterOperator.ALL, FilterOperator.IS_EMPTY)
    known = [*COMPARED, *(operator.value for operator in others)]
    raise FilterError(f"where has no such operator; expected one of {', '.join(known)}")


def found_nodes(results: SearchResults) -> list[NodeWithScore]:
    hidden = {"excluded_embed_metadata_keys": [STAGE_SCORES, STAGE_RANKS]}
    hidden["excluded_llm_metadata_keys"] = hidden["excluded_embed_metadata_keys"]
    return [
        NodeWithScore(
            node=TextNode(text=result.text, id_=result.doc_id, metadata=found_metadata(result), **hidden),
            score=result.score,
        )
        for result in results
    ]


class RerankerPostprocessor(BaseNodePostprocessor):
    """Nodes in the order of a Reranker's scores, best first, which take the place of the retriever's.

    A node without text comes last. ValueError where there is no query, and for what `Reranker` and its `rerank` refuse.
    """

    model: Any = Field(description="A Reranker, or the folder, hub name or package:NAME of one.")
    top_n: int | None = Field(None, ge=1, description="How many nodes come back; None: all.")
    metadata_mode: MetadataMode = Field(MetadataMode.EMBED, description="Which metadata stand before a node's text.")
    batch_size: int = 256
    max_length: int | None = None
    normalize: bool = False
    long_document: str = LONG_DOCUMENT_DEFAULT
    overlap: int = OVERLAP
    _reranker: Reranker = PrivateAttr()

    def model_post_init(self, context: Any) -> None:
        super().model_post_init(context)
        self._reranker = open_reranker(self.model)

    @classmethod
    def class_name(cls) -> str:
        return "RerankerPostprocessor"

    def _postprocess_nodes(
        self, nodes: list[NodeWithScore], query_bundle: QueryBundle | None = None
    ) -> list[NodeWithScore]:
        if query_bundle is None:
            raise ValueError("a reranker needs the query: give query_bundle or query_str")
        query = query_bundle.query_str
        top_n = self.top_n or len(nodes)
        name = "Reranker" if isinstance(self.model, Reranker) else str(self.model)
        dispatcher.event(ReRankStartEvent(query=query, nodes=nodes, top_n=top_n, model_name=name))
        texts = [node.node.get_content(metadata_mode=self.metadata_mode) for node in nodes]
        results = self._reranker.rerank(query, texts, top_k=self.top_n, **rerank_options(self))
        best = [NodeWithScore(node=nodes[result.document_index].node, score=result.score) for result in results]
        dispatcher.event(ReRankEndEvent(nodes=best))
        return best
