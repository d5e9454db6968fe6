"""`RerankerRanker`: a Reranker as a component of a Haystack pipeline.

    pipeline.add_component("ranker", RerankerRanker(model="runs/a/model", top_k=5))
    pipeline.connect("retriever.documents", "ranker.documents")

A pipeline can be written to a file only where the component was given a name or a folder, not an open Reranker.
"""

import os
from dataclasses import replace
from typing import Any

from rag_retrieval.infer.reranker import Reranker, open_reranker
from rag_retrieval.integrations import missing_library
from rag_retrieval.models.options import LONG_DOCUMENT_DEFAULT, OVERLAP

try:
    from haystack import Document, component, default_from_dict, default_to_dict
except ImportError as error:
    raise missing_library("haystack-ai", "haystack") from error


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
        if isinstance(self.model, Reranker):
            raise ValueError("model: an open Reranker cannot be written to a file; give the component a folder or name")
        return default_to_dict(self, model=os.fspath(self.model), top_k=self.top_k, **self.options)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "RerankerRanker":
        return default_from_dict(cls, data)
