"""Texts as the model of an index represents them: dense vectors, lexical weights, token vectors, by one forward."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from rag_retrieval.infer.backend import is_exported
from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.infer.encoded_texts import EncodedTexts
from rag_retrieval.models.options import EmbedderOptions
from rag_retrieval.models.representations import DENSE
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.inverted_lists import Weights
from rag_retrieval.retrieval.token_vectors import TokenVectors

if TYPE_CHECKING:
    import torch


class Encoded(NamedTuple):
    """What a model gives for texts; None for what it is not asked for. dense: float32 [texts, dim]."""

    dense: np.ndarray | None
    lexical: Weights | None
    multi_vector: TokenVectors | None


Encode = Callable[[list[str]], np.ndarray]  # texts to float32 [texts, dim]
Represent = Callable[[list[str]], Encoded]


def open_embedder(options: IndexOptions, device: "str | torch.device | None" = None) -> Embedder:
    """With every option that was given. device: of a model of torch, where the options name none."""
    given = options.given(*EmbedderOptions.model_fields)
    if device is not None and not given.keys() & {"device", "devices"} and not is_exported(options.embedder):
        given["device"] = device
    return Embedder(options.embedder, **given)


def search_device(options: IndexOptions, embedder: Embedder | None = None) -> str:
    """Where vectors are compared: the device that is named, else the CPU beside an exported model, and the one that is
    chosen for a model of torch. embedder: in place of the one that the options name."""
    if options.device in (None, "cpu") and is_exported(embedder.backend.name if embedder else options.embedder):
        return "cpu"
    from rag_retrieval.models.devices import choose_device

    return str(choose_device(options.device))


def encoding_device(options: IndexOptions) -> str:
    """The same for one of the processes of a launch."""
    if is_exported(options.embedder):
        return "cpu"
    from rag_retrieval.core.distributed import own_device

    return str(own_device())


def encode_with(embedder: Embedder, kind: str, options: IndexOptions) -> Encode:
    """To vectors whose inner product is the similarity that the model asks for.

    Raises ValueError for a model that asks for a distance, unless its vectors have length 1.
    """
    shape = {"batch_size": options.batch_size} | dense_options(embedder, options)
    return lambda texts: embedder.encode(texts, kind=kind, show_progress_bar=False, **shape)


def dense_options(embedder: Embedder, options: IndexOptions) -> dict[str, Any]:
    settings = embedder.settings
    if settings.similarity not in ("cosine", "dot") and not settings.normalize:
        raise ValueError(
            f"embedder: this model compares vectors by the {settings.similarity} distance, and an index by their inner "
            "product; say normalize: true to compare by angle"
        )
    normalize = settings.normalize or settings.similarity == "cosine" and options.normalize is None
    return {"dim": options.dim, "normalize": normalize}


def represent_with(embedder: Embedder, kind: str, options: IndexOptions) -> Represent:
    """To all representations of the index."""
    how = {"batch_size": options.batch_size, "show_progress_bar": False} | represented_how(embedder, kind, options)
    is_mean = kind == "query" and embedder.settings.multi_vector_mean
    return lambda texts: encoded_of(embedder.encode(texts, **how), is_mean)


def represented_how(embedder: Embedder, kind: str, options: IndexOptions) -> dict[str, Any]:
    """The options of `Embedder.encode` that decide on what an index compares."""
    wanted = options.representations
    how = {"kind": kind, "outputs": wanted} | (dense_options(embedder, options) if DENSE in wanted else {})
    return how | ({"pool_factor": options.pool_factor} if kind == "document" and options.pool_factor else {})


def encoded_of(texts: EncodedTexts, is_mean: bool) -> Encoded:
    """is_mean: of queries whose MaxSim is a mean (`multi_vector_mean`); their token vectors are divided by their
    number, so that the sum is the score."""
    lexical = tokens = None
    if texts.lexical is not None:
        found = texts.lexical
        lexical = Weights(found.ids.astype(np.int64), found.weights, np.diff(found.starts))
    if texts.multi_vector is not None:
        tokens = TokenVectors.of(texts.multi_vector)
        if is_mean:
            counts = np.repeat(tokens.counts, tokens.counts).astype(np.float32)
            tokens = tokens._replace(vectors=tokens.vectors / counts[:, None])
    return Encoded(texts.dense, lexical, tokens)
