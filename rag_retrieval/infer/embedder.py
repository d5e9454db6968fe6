"""`Embedder`: dense vectors, lexical weights and token vectors of texts, from any folder that holds an embedding model.

Prompts, pooling, maximum lengths and whether vectors have length 1 are what the folder says; where they are asked for
here, what is said here holds. Nothing here imports torch before a model of torch is opened.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from numbers import Real
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import numpy as np

from rag_retrieval.core.log import Progress
from rag_retrieval.infer.backend import EmbedderBackend, open_embedder_backend
from rag_retrieval.infer.encoded_texts import EncodedTexts, LexicalWeights
from rag_retrieval.models.embedding_files import EmbedderSettings
from rag_retrieval.models.inputs import check_flag, check_list, check_number, check_text
from rag_retrieval.models.matching import pool_token_vectors
from rag_retrieval.models.options import EmbedderOptions, options_among
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.representations import DENSE, LEXICAL, MULTI_VECTOR, REPRESENTATIONS
from rag_retrieval.models.settings import resolve_model_path
from rag_retrieval.models.text_scoring import CHUNK_TEXTS, score_texts
from rag_retrieval.models.vectors import (
    RANGES_FILE,
    Int8Ranges,
    VectorPrecision,
    finish,
    ranges_of,
    similarity,
    to_precision,
)

if TYPE_CHECKING:
    import torch

    from rag_retrieval.models.embedder import EmbeddingModel

logger = logging.getLogger(__name__)

TOKEN_VECTOR_TEXTS = 512  # tokenized and computed together where token vectors are asked for: some hundred for a text


class Embedder:
    """A model that gives a vector for a text. Several threads may call one.

    model_name_or_path: a folder that was trained or exported here, a sentence-transformers folder, any other folder of
    an embedding model, a hub name, or `package:NAME`. What it holds is read from its files.
    model_type: of an exported folder "openvino" takes that runtime in place of ONNX Runtime; such a folder takes no
    other option that changes the graph.
    max_length: tokens of a text, special tokens included; default what the folder says, else 512 or the model's limit.
    query_max_length: of a query; default what the folder says, up to max_length where that is given, else as of other
    texts. dtype: of the weights: "fp32" (the default), "bf16", "fp16". precision: of the computation with float32
    weights: "fp32", "bf16", "fp16"; default half precision on CUDA and float32 elsewhere. device: "cpu", "cuda:0",
    "mps", "npu:0"; default CUDA where there is one, else the CPU. devices: several, such as ["cuda:0", "cuda:1"]: each
    holds a copy of the model. attn_implementation: of transformers; default batches without padding. pooling: "cls",
    "mean", "weighted_mean", "last", "latent_attention". prompts: text before a text, by name, such as
    {"query": "query: ", "document": "passage: "}. include_prompt: whether its tokens are pooled too. cls_interval: with
    pooling "cls", one more cls after every so many tokens, and their mean. normalize: whether vectors get length 1.
    bidirectional: whether a decoder's tokens see those after them.
    int8_ranges: a file that `calibrate` wrote; default `int8_ranges.json` in the model's folder, where it is there.

    Raises ValueError for a path that is not there, a folder without weights, weights that are not numbers, a reranker,
    a decoder whose pooling is not known, and options that do not fit.
    """

    def __init__(
        self,
        model_name_or_path: str | os.PathLike,
        *,
        model_type: str | None = None,
        max_length: int | None = None,
        query_max_length: int | None = None,
        precision: str | None = None,
        dtype: "str | torch.dtype | None" = None,
        device: "str | torch.device | None" = None,
        devices: "Sequence[str | torch.device] | None" = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        pooling: str | None = None,
        prompts: Mapping[str, str] | None = None,
        include_prompt: bool | None = None,
        cls_interval: int | None = None,
        normalize: bool | None = None,
        bidirectional: bool | None = None,
        int8_ranges: str | os.PathLike | None = None,
    ):
        options = options_among(locals(), EmbedderOptions)
        self.backend: EmbedderBackend = open_embedder_backend(model_name_or_path, options)
        saved = Path(resolve_model_path(model_name_or_path)) / RANGES_FILE
        self.int8_ranges = Int8Ranges.read(int8_ranges or saved) if int8_ranges or saved.is_file() else None

    @property
    def model(self) -> "EmbeddingModel":
        """The module of torch. Raises ValueError for an exported folder, which has none."""
        return self.backend.model

    @property
    def settings(self) -> EmbedderSettings:
        """How a text becomes a vector."""
        return self.backend.settings

    @property
    def dim(self) -> int:
        """Numbers of a whole vector."""
        return self.backend.dim

    def encode(
        self,
        texts: str | Sequence[str],
        prompt: str | None = None,
        *,
        kind: str | None = None,
        outputs: Sequence[str] | None = None,
        batch_size: int = 256,
        max_length: int | None = None,
        dim: int | None = None,
        normalize: bool | None = None,
        precision: VectorPrecision = "float32",
        pool_factor: float = 1,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray | EncodedTexts:
        """Vectors in the order of the texts: [texts, dim]; of one text that stands in no list: [dim]. With `outputs`,
        an object that holds each of these: see `EncodedTexts`.

        Equal texts are computed once and get the same vector. An empty text has the vector of what stands around it,
        its prompt and the special tokens, as in sentence-transformers; of one end token where that is nothing.
        prompt: text before each, "" for none; default that of the kind. kind: "query", "document" or the name of
        another prompt of the model; default that of the model's default prompt, which most have not.
        outputs: of "dense", "lexical" and "multi_vector", those that the model has and that are wanted, such as
        ("dense", "lexical"). batch_size: texts of one forward at most; a forward is bounded by its tokens besides, and
        on a GPU that bound is halved where memory runs out. max_length: tokens of a text, at most the model's
        positions; default the model's.
        Of dense vectors: dim, the first so many numbers, for models that were trained with Matryoshka; normalize,
        whether they get length 1 after that, default what the model says; precision, "float32", "float16", "int8"
        (after `calibrate`) or "binary" (a bit for each number, uint8 [texts, dim / 8]).
        Of token vectors: float16 where precision is "float16", else float32; pool_factor, at least 1, how many times
        fewer vectors each text gets, which are means of clusters of its own (see `pool_token_vectors`); for documents.
        show_progress_bar: None shows one on a terminal for more than `10 * batch_size` texts.

        Raises ValueError that names the argument and the position, as `texts[3]`, and for a vector that is not finite.
        """
        one = isinstance(texts, str)
        listed = [texts] if one else check_list("texts", texts)
        texts = [check_text(f"texts[{place}]", text) for place, text in enumerate(listed)]
        names = self._checked_outputs(outputs)
        check_number("batch_size", batch_size, 1, "texts")
        max_length = self._checked_limit(kind, prompt, max_length)
        check_pool_factor(pool_factor, kind, names)
        finish_dense = self._finish_dense(dim, normalize, precision) if DENSE in names else None
        if show_progress_bar is None:
            show_progress_bar = len(texts) > 10 * batch_size and sys.stderr.isatty()
        cut = 0
        encode = partial(self.backend.text_encoder.encode, kind=kind, prompt=prompt, max_length=max_length)

        def finish_tokens(vectors: np.ndarray) -> np.ndarray:
            pooled = vectors if pool_factor == 1 else pool_token_vectors(vectors, pool_factor)
            return to_precision(pooled, "float16" if precision == "float16" else "float32")

        with Progress(len(texts), "encoding", "texts", shown=show_progress_bar) as progress:

            def represent(encoded: list[EncodedPair]) -> list[tuple]:
                """The representations of each text, in the order of `names`."""
                nonlocal cut
                cut += sum(text.truncated for text in encoded)
                found = self.backend.encode(encoded, batch_size, names, progress)
                check_finite(found)
                if DENSE in found:
                    found[DENSE] = finish_dense(found[DENSE])
                if MULTI_VECTOR in found:
                    found[MULTI_VECTOR] = [finish_tokens(vectors) for vectors in found[MULTI_VECTOR]]
                return list(zip(*found.values(), strict=True))

            chunk = TOKEN_VECTOR_TEXTS if MULTI_VECTOR in names else CHUNK_TEXTS
            rows = score_texts(texts, encode, represent, chunk * self.backend.devices)
            progress.update(len(texts) - progress.done)  # those that repeat others
        if cut:
            logger.info("%d of %d texts were cut at %d tokens", cut, len(texts), max_length)
        columns = zip(*rows, strict=True) if rows else [()] * len(names)
        found = dict(zip(names, columns, strict=True))
        if DENSE in found:
            found[DENSE] = np.stack(found[DENSE]) if rows else finish_dense(np.empty((0, self.dim), np.float32))
        if LEXICAL in found:
            found[LEXICAL] = LexicalWeights.of(found[LEXICAL], self.backend.text_encoder.fast_tokenizer)
        if MULTI_VECTOR in found:
            found[MULTI_VECTOR] = list(found[MULTI_VECTOR])
        if one:
            found = {name: texts[0] for name, texts in found.items()}
        return found[DENSE] if outputs is None else EncodedTexts(**found)

    def encode_queries(
        self,
        texts: str | Sequence[str],
        *,
        outputs: Sequence[str] | None = None,
        batch_size: int = 256,
        max_length: int | None = None,
        dim: int | None = None,
        normalize: bool | None = None,
        precision: VectorPrecision = "float32",
        show_progress_bar: bool | None = None,
    ) -> np.ndarray | EncodedTexts:
        """`encode` with the model's prompt and maximum length for queries."""
        shape = {"outputs": outputs, "dim": dim, "normalize": normalize, "precision": precision}
        work = {"batch_size": batch_size, "max_length": max_length, "show_progress_bar": show_progress_bar}
        return self.encode(texts, kind="query", **shape, **work)

    def encode_documents(
        self,
        texts: str | Sequence[str],
        *,
        outputs: Sequence[str] | None = None,
        batch_size: int = 256,
        max_length: int | None = None,
        dim: int | None = None,
        normalize: bool | None = None,
        precision: VectorPrecision = "float32",
        pool_factor: float = 1,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray | EncodedTexts:
        """`encode` with the model's prompt and maximum length for documents."""
        shape = {"outputs": outputs, "dim": dim, "normalize": normalize, "precision": precision}
        shape["pool_factor"] = pool_factor
        work = {"batch_size": batch_size, "max_length": max_length, "show_progress_bar": show_progress_bar}
        return self.encode(texts, kind="document", **shape, **work)

    async def aencode(
        self,
        texts: str | Sequence[str],
        prompt: str | None = None,
        *,
        kind: str | None = None,
        outputs: Sequence[str] | None = None,
        batch_size: int = 256,
        max_length: int | None = None,
        dim: int | None = None,
        normalize: bool | None = None,
        precision: VectorPrecision = "float32",
        pool_factor: float = 1,
        show_progress_bar: bool | None = None,
    ) -> np.ndarray | EncodedTexts:
        """`encode` in a thread, so that the event loop is not blocked."""
        shape = {"outputs": outputs, "dim": dim, "normalize": normalize, "precision": precision}
        shape["pool_factor"] = pool_factor
        work = {"batch_size": batch_size, "max_length": max_length, "show_progress_bar": show_progress_bar}
        return await asyncio.to_thread(self.encode, texts, prompt, kind=kind, **shape, **work)

    def similarity(self, queries: np.ndarray, documents: np.ndarray) -> np.ndarray:
        """[queries, documents], float32, as the model compares vectors: mostly the cosine.

        Each of the two is what `encode` gave, in any precision; a single vector counts as one row. Raises ValueError
        for vectors of different dim.
        """
        kind = self.settings.similarity
        return similarity(np.atleast_2d(queries), np.atleast_2d(documents), kind, self.int8_ranges)

    def calibrate(
        self,
        documents: Sequence[str],
        save_to: str | os.PathLike | None = None,
        *,
        dim: int | None = None,
        normalize: bool | None = None,
        batch_size: int = 256,
    ) -> Int8Ranges:
        """The ranges of int8 vectors from a sample of documents (1,000 say), for this Embedder from now on.

        They hold for vectors of this `dim` and `normalize` alone. save_to: a file, or a folder, where they are saved as
        `int8_ranges.json`: in the model's folder every Embedder of it finds them. Raises ValueError for fewer than two.
        """
        vectors = self.encode_documents(documents, dim=dim, normalize=normalize, batch_size=batch_size)
        self.int8_ranges = ranges_of(vectors, self.settings.normalize if normalize is None else normalize)
        if save_to is not None:
            file = Path(save_to)
            self.int8_ranges.save(file / RANGES_FILE if file.is_dir() else file)
        return self.int8_ranges

    def close(self) -> None:
        """Let the model go: its memory, on a device too, is free once nothing else holds it. Encoding then raises
        ValueError."""
        self.backend.close()

    def __enter__(self) -> "Embedder":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def _checked_limit(self, kind: str | None, prompt: str | None, max_length: int | None) -> int:
        """Tokens of a text at most. ValueError where prompt and special tokens leave none of them."""
        encoder = self.backend.text_encoder
        if kind not in (None, "query", "document", *encoder.prompts):
            known = ", ".join(dict.fromkeys(("query", "document", *encoder.prompts)))
            raise ValueError(f"kind: this model has no prompt {kind!r}; it knows {known}")
        limit = encoder.max_length_of(kind) if max_length is None else max_length
        check_number("max_length", limit, 1, "tokens")
        self.backend.check_max_length(limit)
        fixed = encoder.fixed_tokens(encoder.prompt_for(kind) if prompt is None else prompt)
        if fixed >= limit:
            raise ValueError(f"max_length {limit} is too small: prompt and special tokens take {fixed} tokens")
        return limit

    def _checked_outputs(self, outputs: Sequence[str] | None) -> list[str]:
        """In the order of REPRESENTATIONS, ("dense",) for None. ValueError for what the model does not give."""
        names = [DENSE] if outputs is None else check_list("outputs", outputs)
        own = self.settings.representations
        for name in names:
            if name not in own:
                raise ValueError(
                    f"outputs: {self.backend.name} gives {', '.join(own)}, found {name!r}; "
                    + ("name outputs" if outputs is None else "an exported folder gives dense vectors alone")
                )
        if not names:
            raise ValueError("outputs: expected at least one representation, found none")
        return [name for name in REPRESENTATIONS if name in names]

    def _finish_dense(
        self, dim: int | None, normalize: bool | None, precision: VectorPrecision
    ) -> Callable[[np.ndarray], np.ndarray]:
        """From the model's vectors to those that are asked for."""
        normalize = self.settings.normalize if normalize is None else normalize
        check_flag("normalize", normalize)
        dim = self.dim if dim is None else dim
        check_number("dim", dim, 1, "numbers")
        if dim > self.dim:
            raise ValueError(f"dim: this model's vectors have {self.dim} numbers, found {dim}")
        ranges = self._ranges(precision, normalize)
        return lambda vectors: to_precision(finish(vectors, dim, normalize), precision, ranges)

    def _ranges(self, precision: VectorPrecision, normalize: bool) -> Int8Ranges | None:
        if precision not in get_args(VectorPrecision):
            names = ", ".join(get_args(VectorPrecision))
            raise ValueError(
                f"precision of vectors must be one of {names}; found {precision!r}. That of the computation is an "
                "option of Embedder"
            )
        if precision != "int8":
            return None
        if self.int8_ranges is None:
            raise ValueError("precision int8 needs ranges: call calibrate(documents) with a sample of them once")
        if self.int8_ranges.normalized != normalize:
            raise ValueError(
                f"the int8 ranges are of vectors with normalize={self.int8_ranges.normalized}, and normalize is "
                f"{normalize}; calibrate for it"
            )
        return self.int8_ranges


def check_pool_factor(factor: float, kind: str | None, outputs: Sequence[str]) -> None:
    if isinstance(factor, bool) or not isinstance(factor, Real) or not 1 <= factor < np.inf:
        raise ValueError(f"pool_factor must be a number of at least 1, found {factor!r}")
    if factor > 1 and kind == "query":
        raise ValueError("pool_factor is for documents, since every vector of a query counts; leave it out")
    if factor > 1 and MULTI_VECTOR not in outputs:
        logger.warning("pool_factor is of token vectors, which outputs does not name; ignored")


def check_finite(found: Mapping[str, Sequence]) -> None:
    """Of what a backend gave."""
    parts = [found[name] for name in (DENSE,) if name in found]
    parts += [weights for _, weights in found.get(LEXICAL, ())]
    parts += found.get(MULTI_VECTOR, ())
    if not all(np.isfinite(part).all() for part in parts):
        raise ValueError("the model gave a vector that is not finite; in fp16 a model may overflow: use bf16 or fp32")
