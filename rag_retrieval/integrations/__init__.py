"""Embedders, retrievers and rerankers as parts of other frameworks, one module each; what they share stands here.

Each module derives classes from its framework's, so importing it needs the framework; nothing else imports one.
"""

import os
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.models.representations import DENSE
from rag_retrieval.retrieval.filters import AND, NOT, ONE, OR, FilterError, Filters, parse_where
from rag_retrieval.retrieval.index import Index
from rag_retrieval.retrieval.retriever import Retriever
from rag_retrieval.retrieval.searched import SearchResult

STAGE_SCORES, STAGE_RANKS = "stage_scores", "stage_ranks"  # keys in the metadata of a document that was found


def rerank_options(adapter: object) -> dict[str, Any]:
    """The attributes of the adapter that are options of `Reranker.rerank` under the same names."""
    names = ("batch_size", "max_length", "normalize", "long_document", "overlap")
    return {name: getattr(adapter, name) for name in names}


def open_dense_embedder(model: Embedder | str | os.PathLike, model_kwargs: Mapping[str, Any] | None) -> Embedder:
    """The Embedder itself, or that of a folder, hub name or `package:NAME`, with options of `Embedder`. ValueError as
    `Embedder`, for options beside an open one, and for a model without dense vectors, which are all that frameworks
    have a place for."""
    if isinstance(model, Embedder) and not model_kwargs:
        embedder = model
    elif isinstance(model, (str, os.PathLike)):
        embedder = Embedder(model, **model_kwargs or {})
    elif isinstance(model, Embedder):
        raise ValueError("model_kwargs: an open Embedder takes none; give them where it is opened")
    else:
        raise ValueError(f"model: expected an Embedder, or the name or folder of one; found {type(model).__name__}")
    if DENSE not in embedder.settings.representations:
        found = ", ".join(embedder.settings.representations)
        raise ValueError(
            f"model: {embedder.backend.name} gives {found} and no dense vectors, which is what a vector store keeps; "
            "rag-retrieval index takes this model, and IndexRetriever searches that index"
        )
    return embedder


def open_retriever(
    index: Retriever | Index | str | os.PathLike, retriever_kwargs: Mapping[str, Any] | None
) -> Retriever:
    """The Retriever itself, or one over an Index or the folder of one, with options of `Retriever`. ValueError as
    `Retriever`, and for options beside an open one."""
    if isinstance(index, Retriever):
        if retriever_kwargs:
            raise ValueError("retriever_kwargs: an open Retriever takes none; give them where it is opened")
        return index
    if isinstance(index, (Index, str, os.PathLike)):
        return Retriever(index, **retriever_kwargs or {})
    raise ValueError(f"index: expected a Retriever, an Index or the folder of one; found {type(index).__name__}")


def found_metadata(result: SearchResult) -> dict[str, Any]:
    """What the index has, and the score and rank of each stage that found the document."""
    return result.metadata | {STAGE_SCORES: result.scores, STAGE_RANKS: result.ranks}


# ---- filters of frameworks, as `where`


COMPARED = {  # by operator, as Haystack and LlamaIndex both write it: the condition of `where` for its value
    "==": lambda value: {"in": [value]},
    "!=": lambda value: {"ne": value},
    ">": lambda value: {"gt": value},
    ">=": lambda value: {"gte": value},
    "<": lambda value: {"lt": value},
    "<=": lambda value: {"lte": value},
    "in": lambda value: {"in": value},
}


def all_of(*conditions: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
    """`where` for what all of these hold for; None and {} are no condition."""
    given = [condition for condition in conditions if condition]
    return {AND: given} if len(given) > 1 else given[0] if given else None


def condition_on(documents: Filters, field: str, condition: Any, shapes: Set[str] = frozenset({ONE})) -> dict[str, Any]:
    """`where` of one field, for a framework's condition that means the same where all documents have one of `shapes`
    there, and values of one kind. FilterError for other documents, and as `Filters.rows`."""
    if field in (AND, OR, NOT):
        raise FilterError("where cannot name such a field")
    where = {field: condition}
    (parsed,) = parse_where(where)
    column = documents.column(field)
    column.check_kinds(parsed)
    if len(column.kinds) > 1 or column.shapes - shapes:
        others = sorted(column.shapes - shapes) or ["values of several kinds"]
        raise FilterError(
            f"documents have {' or '.join(others)} there, which this operator compares unlike where; give it as where"
        )
    return where


@contextmanager
def named_errors(place: str) -> Iterator[None]:
    """place: field and operator, as the framework writes them, for the message of a FilterError."""
    try:
        yield
    except FilterError as error:
        raise FilterError(f"filters: {place}: {error}") from error


def missing_library(library: str, extra: str) -> ImportError:
    return ImportError(f"this adapter needs {library}; run: pip install -e '.[{extra}]'")
