"""An Embedder, a Retriever and a Reranker as components of Haystack pipelines.

    pipeline.add_component("embedder", EmbedderTextEmbedder(model="runs/e/model"))
    pipeline.add_component("retriever", InMemoryEmbeddingRetriever(store))
    pipeline.add_component("ranker", RerankerRanker(model="runs/a/model", top_k=5))
    pipeline.connect("embedder.embedding", "retriever.query_embedding")
    pipeline.connect("retriever.documents", "ranker.documents")

A pipeline can be written to a file only where components were given names or folders, not open models.
"""

import os
import re
from collections.abc import Mapping
from dataclasses import fields, replace
from datetime import datetime
from functools import lru_cache
from typing import Any

from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.infer.reranker import Reranker, open_reranker
from rag_retrieval.integrations import (
    COMPARED,
    all_of,
    condition_on,
    found_metadata,
    missing_library,
    named_errors,
    open_dense_embedder,
    open_retriever,
)
from rag_retrieval.models.inputs import check_text
from rag_retrieval.models.options import LONG_DOCUMENT_DEFAULT, OVERLAP
from rag_retrieval.retrieval.filters import AND, NOT, OR, RANGE, Column, FilterError, Filters, shown
from rag_retrieval.retrieval.index import Index
from rag_retrieval.retrieval.retriever import Retriever

try:
    from haystack import Document, component, default_from_dict, default_to_dict
    from haystack.document_stores.types import FilterPolicy, apply_filter_policy
except ImportError as error:
    raise missing_library("haystack-ai", "haystack") from error

GROUPS = ("AND", "OR", "NOT")
NOT_IN = "not in"
OPERATORS = (*COMPARED, NOT_IN)
LIKE_DATE = re.compile(r"\d{4}-\d\d-\d\d(?:[Tt ]|\Z)")
DATE = re.compile(
    r"(\d{4}-\d\d-\d\d(?:[T ](?:[01]\d|2[0-3]):\d\d(?::\d\d(?:\.\d{1,6})?)?)?)(Z|[+-]\d\d:\d\d)?", re.ASCII
)


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
    it is opened here. filters: Haystack's own, on the metadata, which hold besides `where`; filter_policy: what becomes
    of them where a run has others, as in Haystack's retrievers. A document's meta are the index's, and the scores and
    ranks of all stages, in `stage_scores` and `stage_ranks`.
    """

    def __init__(
        self,
        index: Retriever | Index | str | os.PathLike,
        top_k: int = 10,
        where: dict[str, Any] | None = None,
        retriever_kwargs: dict[str, Any] | None = None,
        filters: dict[str, Any] | None = None,
        filter_policy: FilterPolicy = FilterPolicy.REPLACE,
    ):
        self.index = index
        self.top_k = top_k
        self.where = where
        self.filters = filters
        self.filter_policy = filter_policy
        self.retriever_kwargs = retriever_kwargs
        self._retriever: Retriever | None = None

    def warm_up(self) -> None:
        """Open the index; again, nothing. ValueError as `Retriever`."""
        if self._retriever is None:
            self._retriever = open_retriever(self.index, self.retriever_kwargs)

    @component.output_types(documents=list[Document])
    def run(
        self,
        query: str,
        top_k: int | None = None,
        where: dict[str, Any] | None = None,
        filters: dict[str, Any] | None = None,
    ) -> dict[str, list[Document]]:
        """top_k, where: in the place of the component's own; filters: as `filter_policy` says. ValueError for what
        `Retriever.search` refuses, and for filters that `where_of` does."""
        self.warm_up()
        top_k, where = self.top_k if top_k is None else top_k, self.where if where is None else where
        filters = apply_filter_policy(self.filter_policy, self.filters, filters)
        where = all_of(where, where_of(filters, self._retriever.index.opened.filters) if filters else None)
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
        options |= {"filters": self.filters, "filter_policy": self.filter_policy.value}
        return default_to_dict(self, index=named("index", self.index), **options)

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> "IndexRetriever":
        options = data.get("init_parameters", {})
        if "filter_policy" in options:
            options = options | {"filter_policy": FilterPolicy.from_str(options["filter_policy"])}
        return default_from_dict(cls, data | {"init_parameters": options})


def where_of(filters: Any, documents: Filters) -> dict[str, Any]:
    """Haystack's filters as `where` that holds for the same of these documents, as its store in memory compares them.

    Raises FilterError, with field and operator, for filters that are none, for what `Filters.rows` refuses, and where
    Haystack compares in another way than `where`: lists and objects as a whole, values of several kinds, and strings
    that are dates, unless all are written alike. The latter also depends on the documents.
    """
    if not isinstance(filters, Mapping):
        raise FilterError(f"filters: expected an object, found {shown(filters)}")
    if "field" in filters:
        with named_errors(f"{filters['field']} {filters.get('operator')}"):
            return compared(filters, documents)
    operator, conditions = filters.get("operator"), filters.get("conditions")
    if operator not in GROUPS or not isinstance(conditions, list) or not conditions:
        expected = f"expected field, operator and value, or an operator of {', '.join(GROUPS)} and a list of conditions"
        raise FilterError(f"filters: {expected}; found {shown(filters)}")
    group = {OR if operator == "OR" else AND: [where_of(one, documents) for one in conditions]}
    return {NOT: group} if operator == "NOT" else group


def compared(comparison: Mapping[str, Any], documents: Filters) -> dict[str, Any]:
    """A filter of one field."""
    name, operator = comparison["field"], comparison.get("operator")
    if not isinstance(name, str) or operator not in OPERATORS or "value" not in comparison:
        raise FilterError(f"expected an operator of {', '.join(OPERATORS)}, and a value; found {shown(comparison)}")
    field = name.removeprefix("meta.")
    if field == name and ("." in name or name in [each.name for each in fields(Document)]):
        raise FilterError("where compares metadata alone; their fields are written meta.NAME")
    value = comparison["value"]
    values = [each.isoformat() if isinstance(each, datetime) else each for each in listed(value)]
    condition = COMPARED["in" if operator == NOT_IN else operator](values if isinstance(value, list) else values[0])
    where = condition_on(documents, field, condition)
    check_dates(documents.column(field), values, is_range=not condition.keys().isdisjoint(RANGE))
    return {NOT: where} if operator == NOT_IN else where


def listed(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def check_dates(column: Column, values: list[Any], is_range: bool) -> None:
    """FilterError where Haystack compares strings as points in time, and these are not in the order of their
    characters. is_range: otherwise strings are compared that begin as dates do."""
    for form in {date_form(value) for value in values if isinstance(value, str)}:
        others = date_forms(column) - (set() if is_range else {None})
        if (form is not None or is_range) and (not form or others - {form}):
            raise FilterError(
                "Haystack compares strings as dates, and where by their characters; expected all documents and the "
                "filter to write dates alike, such as 2024-03-31 or 2024-03-31T18:00:00+00:00"
            )


@lru_cache(16)
def date_forms(column: Column) -> frozenset[str | None]:
    """Of all strings there."""
    return frozenset(map(date_form, column.values[str]))


def date_form(text: str) -> str | None:
    """None for what Haystack takes for no date when it looks for equal ones. Two dates of one form are in the order of
    their characters; "" is for other ones."""
    if not LIKE_DATE.match(text):
        return None
    date = DATE.fullmatch(text)
    return re.sub(r"\d", "0", date[1]) + (date[2] or "") if date else ""


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
