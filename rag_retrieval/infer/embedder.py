"""`Embedder`: dense vectors, lexical weights and token vectors of texts, from any folder that holds an embedding model.

Prompts, pooling, maximum lengths and whether vectors have length 1 are what the folder says; where they are asked for
here, what is said here holds. Nothing here imports torch before a model of torch is opened.
"""

import asyncio
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rag_retrieval.core.log import Progress
from rag_retrieval.infer.backend import EmbedderBackend, open_embedder_backend
from rag_retrieval.infer.encoded_texts import EncodedTexts, token_name
from rag_retrieval.infer.explain import Explanation, explained
from rag_retrieval.infer.output_form import checked_outputs, choose_form
from rag_retrieval.infer.pair_scores import PairScores, ensemble_weights, joined, score_encoded
from rag_retrieval.models.embedding_files import EmbedderSettings
from rag_retrieval.models.inputs import check_list, check_number, check_pairs, check_text
from rag_retrieval.models.options import EmbedderOptions, options_among
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.representations import DENSE, MULTI_VECTOR
from rag_retrieval.models.settings import resolve_model_path
from rag_retrieval.models.text_scoring import CHUNK_TEXTS, distinct, score_texts
from rag_retrieval.models.token_batch import make_batch
from rag_retrieval.models.vectors import (
    RANGES_FILE,
    Int8Ranges,
    VectorPrecision,
    ranges_of,
    similarity,
)

if TYPE_CHECKING:
    import torch

    from rag_retrieval.models.embedder import EmbeddingModel

logger = logging.getLogger(__name__)

SCORED_PAIRS = 1024  # encoded together by `compute_score`
TOKEN_VECTOR_TEXTS = 512  # tokenized and computed together where token vectors are asked for: some hundred for a text


class Embedder:
    """A model that gives a dense vector for a text, or weights or vectors of its tokens. Several threads may call one.

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

    @property
    def kinds(self) -> tuple[str, ...]:
        """What `encode` takes as `kind`: "query", "document" and the names of the model's prompts."""
        return tuple(dict.fromkeys(("query", "document", *self.backend.text_encoder.prompts)))

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
        shape = (outputs, kind, dim, normalize, precision, pool_factor)
        form = choose_form(self.backend, self.int8_ranges, *shape)
        check_number("batch_size", batch_size, 1, "texts")
        max_length = self.text_limit(kind, prompt, max_length)
        if show_progress_bar is None:
            show_progress_bar = len(texts) > 10 * batch_size and sys.stderr.isatty()
        cut, encoder = 0, self.backend.text_encoder
        encode = partial(encoder.encode, kind=kind, prompt=prompt, max_length=max_length)
        with Progress(len(texts), "encoding", "texts", shown=show_progress_bar) as progress:

            def represent(encoded: list[EncodedPair]) -> list[tuple]:
                nonlocal cut
                cut += sum(text.truncated for text in encoded)
                return form.rows(self.backend.encode(encoded, batch_size, form.names, progress))

            chunk = TOKEN_VECTOR_TEXTS if MULTI_VECTOR in form.names else CHUNK_TEXTS
            rows = score_texts(texts, encode, represent, chunk * self.backend.devices)
            progress.update(len(texts) - progress.done)  # those that repeat others
        if cut:
            logger.info("%d of %d texts were cut at %d tokens", cut, len(texts), max_length)
        found = form.collected(rows, encoder.fast_tokenizer)
        if one:
            found = EncodedTexts(*(part if part is None else part[0] for part in vars(found).values()))
        return found.dense if outputs is None else found

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

    def compute_score(
        self,
        pairs: Sequence[Sequence[str]] | Sequence[str],
        weights: Mapping[str, float] | Sequence[float] | None = None,
        *,
        outputs: Sequence[str] | None = None,
        batch_size: int = 256,
        max_length: int | None = None,
        query_max_length: int | None = None,
    ) -> PairScores:
        """Scores of [query, document] pairs, or of one such pair, by each representation of the model and mixed.

        dense: as `similarity`. lexical: the sum of w_q w_d over common tokens. multi_vector: for each vector of the
        query the largest product with one of the document, summed, or averaged where `settings.multi_vector_mean`.
        ensemble: the sum of weight times score. weights: by name, or of (dense, lexical, multi_vector); default those
        that the model was trained with, else 1, 0.3 and 1. outputs: the representations to score by, default all that
        the model has. batch_size: texts of one forward at most. max_length, query_max_length: tokens of a document and
        of a query; default the model's. Raises ValueError that names the position of a bad pair, and for weights of
        what is not scored by.
        """
        pairs = check_pairs(pairs)
        outputs = checked_outputs(self.settings.representations if outputs is None else outputs, self.backend)
        chosen = ensemble_weights(weights, outputs, self.settings.ensemble_weights)
        work = {"outputs": outputs, "batch_size": batch_size, "show_progress_bar": False}
        parts = []
        for start in range(0, max(1, len(pairs)), SCORED_PAIRS):
            part = pairs[start : start + SCORED_PAIRS]
            queries, query_places = distinct(query for query, _ in part)
            documents, document_places = distinct(document for _, document in part)
            of_queries = self.encode_queries(queries, max_length=query_max_length, **work)
            of_documents = self.encode_documents(documents, max_length=max_length, **work)
            places = list(zip(query_places, document_places, strict=True))
            parts.append(score_encoded(of_queries, of_documents, places, self.settings, chosen))
        return joined(parts)

    def explain(
        self, query: str, document: str, *, max_length: int | None = None, query_max_length: int | None = None
    ) -> Explanation:
        """Which document token each query token meets in MaxSim, and which tokens both have, with their weights.

        `print` shows a table; a notebook and `save("why.html")` show a picture. max_length, query_max_length: as for
        `compute_score`. Raises ValueError for a model that gives dense vectors alone.
        """
        own = self.settings.representations
        if own == (DENSE,):
            raise ValueError(f"{self.backend.name} gives dense vectors alone, which say nothing of single tokens")
        of_query = self.encode_queries([check_text("query", query)], outputs=own, max_length=query_max_length)
        of_document = self.encode_documents([check_text("document", document)], outputs=own, max_length=max_length)
        weights = ensemble_weights(None, own, self.settings.ensemble_weights)
        scores = score_encoded(of_query, of_document, [(0, 0)], self.settings, weights)
        sides = (query, "query", query_max_length), (document, "document", max_length)
        names = [self._vector_tokens(*side) if MULTI_VECTOR in own else [] for side in sides]
        return explained(query, document, scores, of_query, of_document, *names)

    def _vector_tokens(self, text: str, kind: str, max_length: int | None) -> list[str]:
        """Names of the tokens that have a vector."""
        encoder = self.backend.text_encoder
        batch = make_batch(encoder.encode([text], kind, max_length=self.text_limit(kind, max_length=max_length)))
        kept = batch.ids[self.backend.kept_tokens(batch)]
        return [token_name(encoder.fast_tokenizer, token) for token in kept.tolist()]

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

    def text_limit(
        self, kind: str | None = None, prompt: str | None = None, max_length: int | None = None
    ) -> int:
        """Tokens of a text at most, as `encode` cuts it. Raises ValueError for a kind that is not one of `kinds`, and
        where prompt and special tokens leave no tokens for the text."""
        encoder = self.backend.text_encoder
        if kind is not None and kind not in self.kinds:
            raise ValueError(f"kind: this model has no prompt {kind!r}; it knows {', '.join(self.kinds)}")
        limit = encoder.max_length_of(kind) if max_length is None else max_length
        check_number("max_length", limit, 1, "tokens")
        self.backend.check_max_length(limit)
        fixed = encoder.fixed_tokens(encoder.prompt_for(kind) if prompt is None else prompt)
        if fixed >= limit:
            raise ValueError(f"max_length {limit} is too small: prompt and special tokens take {fixed} tokens")
        return limit
