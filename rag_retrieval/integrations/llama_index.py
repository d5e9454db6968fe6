"""`RerankerPostprocessor`: a Reranker where LlamaIndex takes a node postprocessor, such as a RetrieverQueryEngine.

    index.as_query_engine(node_postprocessors=[RerankerPostprocessor(model="runs/a/model", top_n=5)])

LlamaIndex puts a node's metadata before its text for embedding models and rerankers alike, and so does this. A model
that was trained on bare passages wants metadata_mode=MetadataMode.NONE.
"""

from typing import Any

from rag_retrieval.infer.reranker import Reranker, open_reranker
from rag_retrieval.integrations import missing_library, rerank_options
from rag_retrieval.models.options import LONG_DOCUMENT_DEFAULT, OVERLAP

try:
    from llama_index.core.bridge.pydantic import Field, PrivateAttr
    from llama_index.core.instrumentation import get_dispatcher
    from llama_index.core.instrumentation.events.rerank import ReRankEndEvent, ReRankStartEvent
    from llama_index.core.postprocessor.types import BaseNodePostprocessor
    from llama_index.core.schema import MetadataMode, NodeWithScore, QueryBundle
except ImportError as error:
    raise missing_library("llama-index-core", "llama-index") from error

dispatcher = get_dispatcher(__name__)


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
