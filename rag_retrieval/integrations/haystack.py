"""An Embedder, a Retriever and a Reranker as components of Haystack pipelines.

    pipeline.add_component("embedder", EmbedderTextEmbedder(model="runs/e/model"))
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store))
    pipeline.add_component("ranker", RerankerRanker(model="runs/a/model", top_k=5))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    pipeline.connect("retriever.documents", "ranker.documents")

A pipeline can be written to a file only where components were given names or folders, not open models.
"""

import os
from dataclasses import replace
from typing import Any

from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.infer.reranker import Reranker, open_reranker
from rag_retrieval.integrations import found_metadata, missing_library, open_dense_embedder, open_retriever
from rag_retrieval.models.inputs import check_text
from rag_retrieval.models.options import LONG_DOCUMENT_DEFAULT, OVERLAP
from rag_retrieval.retrieval.index import Index
from rag_retrieval.retrieval.retriever import Retriever

try:
    from haystack import Document, component, default_from_dict, default_to_dict
except ImportError as error:
    raise missing_library("haystack-ai", "haystack") from error


@component
class EmbedderTextEmbedder:
    """The dense vector of a query, with the model's prompt for queries.

    model: an Embedder, or the folder, hub name or package:NAME of one, opened by `warm_up` or the first `run`.
    model_kwargs: options of Embedder, for that. Other options as for `Embedder.encode_queries`.
    """

    def __init__(
        self,
        model: Embedder | str | os.PathLike,
        model_kwargs: dict[str, Any] | None = None,
        max_length: int | None = None,
        dim: int | None = None,
        normalize: bool | None = None,
    ):
        self.model = model
        self.model_kwargs = model_kwargs
        self.options = {"max_length": max_length, "dim": dim, "normalize": normalize}
        self._embedder: Embedder | None = None

    def warm_up(self) -> None:
        """Open the model; again, nothing. ValueError as `Embedder`, and for a model without dense vectors."""
        if self._embedder is None:
            self._embedder = open_dense_embedder(self.model, self.model_kwargs)

    @component.output_types(embedding=list[float])
    def run(self, text: str) -> dict[str, list[float]]:
        """ValueError for what is no text."""
        self.warm_up()
        return {"embedding": self._embedder.encode_queries(check_text("text", text), **self.options).tolist()}

    def to_dict(self) -> dict[str, Any]:
        """For pipeline files. ValueError where the component was given an open Embedder."""
        options = {"model_kwargs": self.model_kwargs, **self.options}
        return default_to_dict(self, model=named("model", self.model), **options)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EmbedderTextEmbedder":
        return default_from_dict(cls, data)


@component
class EmbedderDocumentEmbedder:
    """Copies of documents with their dense vectors, with the model's prompt for documents.

    model, model_kwargs: as for EmbedderTextEmbedder. meta_fields_to_embed: metadata that stand before a document's
    text, joined by embedding_separator, as in Haystack's own. Other options as for `Embedder.encode_documents`.
    """

    def __init__(
        self,
        model: Embedder | str | os.PathLike,
        model_kwargs: dict[str, Any] | None = None,
        meta_fields_to_embed: list[str] | None = None,
        embedding_separator: str = "\n",
        batch_size: int = 256,
        max_length: int | None = None,
        dim: int | None = None,
        normalize: bool | None = None,
    ):
        self.model = model
        self.model_kwargs = model_kwargs
        self.meta_fields_to_embed = meta_fields_to_embed or []
        self.embedding_separator = embedding_separator
        self.options = {"batch_size": batch_size, "max_length": max_length, "dim": dim, "normalize": normalize}
        self._embedder: Embedder | None = None

    def warm_up(self) -> None:
        """Open the model; again, nothing. ValueError as `Embedder`, and for a model without dense vectors."""
        if self._embedder is None:
            self._embedder = open_dense_embedder(self.model, self.model_kwargs)

    @component.output_types(documents=list[Document])
    def run(self, documents: list[Document]) -> dict[str, list[Document]]:
        """A document without text has the vector of its metadata, or of an empty text."""
        self.warm_up()
        vectors = self._embedder.encode_documents([self._text(document) for document in documents], **self.options)
        pairs = zip(documents, vectors.tolist(), strict=True)
        return {"documents": [replace(document, embedding=vector) for document, vector in pairs]}

    def _text(self, document: Document) -> str:
        values = [document.meta.get(name) for name in self.meta_fields_to_embed]
        shown = [str(value) for value in values if value is not None]
        return self.embedding_separator.join([*shown, document.content or ""])

    def to_dict(self) -> dict[str, Any]:
        """For pipeline files. ValueError where the component was given an open Embedder."""
        text = {"meta_fields_to_embed": self.meta_fields_to_embed, "embedding_separator": self.embedding_separator}
        options = {"model_kwargs": self.model_kwargs, **text, **self.options}
        return default_to_dict(self, model=named("model", self.model), **options)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "EmbedderDocumentEmbedder":
        return default_from_dict(cls, data)


@component
class IndexRetriever:
    """What a Retriever finds, best first, each document with the score of the last stage.

    index: a Retriever, an Index, or the folder of one, opened by `warm_up` or the first `run`. top_k: documents of a
    query. where: conditions on the metadata, as for `Retriever.search`. retriever_kwargs: options of Retriever, where
    it is opened here. A document's meta are the index's, and the scores and ranks of all stages, in `stage_scores` and
    `stage_ranks`.
    """

    def __init__(
        self,
        index: Retriever | Index | str | os.PathLike,
        top_k: int = 10,
        where: dict[str, Any] | None = None,
        retriever_kwargs: dict[str, Any] | None = None,
    ):
        self.index = index
        self.top_k = top_k
        self.where = where
        self.retriever_kwargs = retriever_kwargs
        self._retriever: Retriever | None = None

    def warm_up(self) -> None:
        """Open the index; again, nothing. ValueError as `Retriever`."""
        if self._retriever is None:
            self._retriever = open_retriever(self.index, self.retriever_kwargs)

    @component.output_types(documents=list[Document])
    def run(
        self, query: str, top_k: int | None = None, where: dict[str, Any] | None = None
    ) -> dict[str, list[Document]]:
        """top_k, where: in the place of the component's own. ValueError for what `Retriever.search` refuses."""
        self.warm_up()
        top_k, where = self.top_k if top_k is None else top_k, self.where if where is None else where
        results = self._retriever.search(query, top_k, where)
        return {
            "documents": [
                Document(id=result.doc_id, content=result.text, meta=found_metadata(result), score=result.score)
                for result in results
            ]
        }

    def to_dict(self) -> dict[str, Any]:
        """For pipeline files. ValueError where the component was given an open Retriever or Index."""
        options = {"top_k": self.top_k, "where": self.where, "retriever_kwargs": self.retriever_kwargs}
        return default_to_dict(self, index=named("index", self.index), **options)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "IndexRetriever":
        return default_from_dict(cls, data)


@component
class RerankerRanker:
    """Documents in the order of a Reranker's scores, best first, each with its score.

    model: a Reranker, or the folder, hub name or package:NAME of one, opened by `warm_up` or the first `run`. top_k:
    how many documents come back, None for all. Other options as for `Reranker.rerank`.
    """

    def __init__(
        self,
        model: Reranker | str | os.PathLike,
        top_k: int | None = None,
        batch_size: int = 256,
        max_length: int | None = None,
        normalize: bool = False,
        long_document: str = LONG_DOCUMENT_DEFAULT,
        overlap: int = OVERLAP,
    ):
        self.model = model
        self.top_k = top_k
        self.options = {
            "batch_size": batch_size,
            "max_length": max_length,
            "normalize": normalize,
            "long_document": long_document,
            "overlap": overlap,
        }
        self._reranker: Reranker | None = None

    def warm_up(self) -> None:
        """Open the model; again, nothing. ValueError as `Reranker`."""
        if self._reranker is None:
            self._reranker = open_reranker(self.model)

    @component.output_types(documents=list[Document])
    def run(self, query: str, documents: list[Document], top_k: int | None = None) -> dict[str, list[Document]]:
        """Copies of the documents with their scores; one without text comes last. top_k: in the place of the
        component's own. ValueError for what `Reranker.rerank` refuses."""
        self.warm_up()
        texts = [document.content for document in documents]
        results = self._reranker.rerank(query, texts, top_k=self.top_k if top_k is None else top_k, **self.options)
        return {"documents": [replace(documents[result.document_index], score=result.score) for result in results]}

    def to_dict(self) -> dict[str, Any]:
        """For pipeline files. ValueError where the component was given an open Reranker."""
        return default_to_dict(self, model=named("model", self.model), top_k=self.top_k, **self.options)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RerankerRanker":
        return default_from_dict(cls, data)


def named(key: str, value: Any) -> str:
    """The folder or name that a component was given. ValueError for an open object."""
    if isinstance(value, (str, os.PathLike)):
        return os.fspath(value)
    found = type(value).__name__
    raise ValueError(f"{key}: an open {found} cannot be written to a file; give the component a folder or name")
