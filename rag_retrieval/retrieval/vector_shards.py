"""Documents of a corpus as a model represents them, encoded once for all representations, in shards.

A shard is a folder with `vectors.npy` and, with `rescore_precision`, `finer.npy` (dense); the inverted lists of weights
(`lexical`); token vectors and, where they are found by centroids, the inverted lists of these (`multi_vector`). Those
that the index is not asked for are not there.
"""

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rag_retrieval.core.shard_folder import MakeShard
from rag_retrieval.data.corpus import Corpus
from rag_retrieval.models.representations import DENSE, LEXICAL, MULTI_VECTOR
from rag_retrieval.models.vectors import RANGES_FILE, Int8Ranges, ranges_of
from rag_retrieval.retrieval import token_codec
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.encoding import Encoded, encoding_device, open_embedder, represent_with
from rag_retrieval.retrieval.inverted_lists import write_lists
from rag_retrieval.retrieval.lexical import LexicalSearch
from rag_retrieval.retrieval.stored_vectors import NumberCodec, Vectors, append_vectors, drawn_rows
from rag_retrieval.retrieval.token_vectors import COUNTS, TOKEN_LISTS, TOKENS, StoredTokens, TokenVectors

VECTORS, FINER = "vectors", "finer"
ENCODED, WITH_TOKENS = 4096, 256  # documents encoded and written at once; those with token vectors
SAMPLED = 10_000  # documents that codes of fewer bits are fitted to, at most
SAMPLED_NUMBERS = 1 << 26  # of their token vectors, about


# ---- what is kept


def read_ranges(fitted: Path | None) -> Int8Ranges | None:
    """Of dense vectors. fitted: the folder that `open_samples` wrote, None where there is none."""
    return fitted and Int8Ranges.read(fitted / RANGES_FILE)


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*"))


def fitted_folder(paths: Mapping[str, Path]) -> Path | None:
    """paths: of the parts of an index."""
    return shards_of(paths["ranges"])[0] if "ranges" in paths else None


def precisions(options: IndexOptions) -> dict[str, str]:
    """Of the copies of the dense vectors."""
    if DENSE not in options.representations:
        return {}
    finer = {FINER: options.rescore_precision} if options.rescore_precision else {}
    return {VECTORS: options.vector_precision} | finer


def dense_codecs(fitted: Path | None, options: IndexOptions) -> dict[str, NumberCodec]:
    ranges = read_ranges(fitted) if options.fits_vectors else None
    return {name: NumberCodec(precision, ranges) for name, precision in precisions(options).items()}


def open_vectors(paths: Mapping[str, Path], options: IndexOptions) -> list[Vectors]:
    """The vectors that are searched and, where there is one, the finer copy. paths: of the parts of an index."""
    shards, codecs = shards_of(paths["vectors"]), dense_codecs(fitted_folder(paths), options)
    return [Vectors(shards, name, codec) for name, codec in codecs.items()]


def open_tokens(paths: Mapping[str, Path], options: IndexOptions, device: str) -> StoredTokens:
    codec = token_codec.read_codec(fitted_folder(paths), options.token_precision, device)
    return StoredTokens(shards_of(paths["vectors"]), codec)


# ---- making it


def open_samples(corpus: Path, options: IndexOptions) -> MakeShard:
    """Makes the one shard with what is fitted to documents that the seed draws: int8 ranges, centroids, codes."""
    device = encoding_device(options)

    def make(number: int, folder: Path) -> None:
        documents = Corpus(corpus)
        represent = represent_with(open_embedder(options, device), "document", options)
        rows = drawn_rows(len(documents), SAMPLED, options.seed)
        dense, tokens, numbers = [], [], 0
        order = np.random.default_rng(options.seed).permutation(rows)
        for start in range(0, len(order), at_once(options)):
            encoded = represent([documents.text(row) for row in order[start : start + at_once(options)].tolist()])
            dense.append(encoded.dense)
            if options.fits_tokens and numbers < SAMPLED_NUMBERS:
                tokens += encoded.multi_vector.texts()
                numbers += encoded.multi_vector.vectors.size
            elif not options.fits_vectors:
                break
        if options.fits_vectors:
            fit_ranges(np.concatenate(dense)).save(folder / RANGES_FILE)
        if options.fits_tokens:
            token_codec.fit(TokenVectors.of(tokens), len(documents), options, device, folder)

    return make


def at_once(options: IndexOptions) -> int:
    return WITH_TOKENS if MULTI_VECTOR in options.representations else ENCODED


def fit_ranges(vectors: np.ndarray) -> Int8Ranges:
    normalized = bool(np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3))
    return ranges_of(np.resize(vectors, (max(len(vectors), 2), vectors.shape[1])), normalized)  # of one twice the same


class Rows(NamedTuple):
    """Documents as one representation keeps them, one after another: arrays of entries, and the entries of each."""

    arrays: Sequence[np.ndarray]
    counts: np.ndarray


def merged(is_fresh: np.ndarray, fresh: Rows | None, kept: Rows | None) -> Rows:
    """fresh, kept: the documents where the mask [documents] is true, and the others; None where there are none."""
    if fresh is None or kept is None:
        return kept if fresh is None else fresh
    counts = placed(is_fresh, fresh.counts, kept.counts)
    entries = np.repeat(is_fresh, counts)
    return Rows([placed(entries, *both) for both in zip(fresh.arrays, kept.arrays, strict=True)], counts)


def placed(is_first: np.ndarray, first: np.ndarray, second: np.ndarray) -> np.ndarray:
    values = np.empty((len(is_first), *first.shape[1:]), first.dtype)
    values[is_first], values[~is_first] = first, second
    return values


class DenseWriter:
    """Of the vectors of shards, one shard after another. old: shards whose documents are copied."""

    def __init__(self, options: IndexOptions, fitted: Path | None, device: str, old: Sequence[Path]):
        self.codecs = dense_codecs(fitted, options)
        self.old = [Vectors(old, name, codec) for name, codec in self.codecs.items()] if old else []

    def encoded(self, texts: Encoded) -> Rows:
        return Rows([codec.encode(texts.dense) for codec in self.codecs.values()], np.ones(len(texts.dense), int))

    def kept(self, rows: np.ndarray) -> Rows:
        return Rows([vectors.stored(rows) for vectors in self.old], np.ones(len(rows), int))

    def append(self, shard: Path, rows: Rows) -> None:
        for name, vectors in zip(self.codecs, rows.arrays, strict=True):
            append_vectors(shard / f"{name}.npy", vectors)

    def finish(self, shard: Path) -> None:
        """All documents of the shard are there."""


class LexicalWriter:
    """The same of weights. The lists of a shard are made in memory."""

    def __init__(self, options: IndexOptions, fitted: Path | None, device: str, old: Sequence[Path]):
        self.old, self.rows = LexicalSearch(old, represent=None), []

    def encoded(self, texts: Encoded) -> Rows:
        return Rows(texts.lexical[:2], texts.lexical.counts)

    def kept(self, rows: np.ndarray) -> Rows:
        weights = self.old.rows(rows)
        return Rows(weights[:2], weights.counts)

    def append(self, shard: Path, rows: Rows) -> None:
        self.rows.append(rows)

    def finish(self, shard: Path) -> None:
        ids, weights = (np.concatenate([rows.arrays[place] for rows in self.rows]) for place in range(2))
        write_lists(shard, LEXICAL, ids, np.concatenate([rows.counts for rows in self.rows]), weights)
        self.rows = []


class TokenWriter:
    """The same of token vectors."""

    def __init__(self, options: IndexOptions, fitted: Path | None, device: str, old: Sequence[Path]):
        self.codec = token_codec.read_codec(fitted, options.token_precision, device)
        self.centroids = token_codec.read_centroids(fitted) if options.has_token_lists else None
        self.old = StoredTokens(old, self.codec) if old else None
        self.device, self.lists = device, []

    def encoded(self, texts: Encoded) -> Rows:
        return Rows([self.codec.encode(texts.multi_vector.vectors)], texts.multi_vector.counts)

    def kept(self, rows: np.ndarray) -> Rows:
        return Rows([self.old.stored(rows)], self.old.counts(rows))

    def append(self, shard: Path, rows: Rows) -> None:
        append_vectors(shard / f"{TOKENS}.npy", rows.arrays[0])
        append_vectors(shard / f"{COUNTS}.npy", rows.counts.astype(np.int32))
        if self.centroids is not None:
            vectors = self.codec.decode(rows.arrays[0])
            codes = token_codec.nearest_centroids(vectors, self.centroids, self.device)
            documents = np.repeat(np.arange(len(rows.counts)), rows.counts)
            found = np.unique(documents << 32 | codes)  # a document once for each centroid
            self.lists.append((found & 0xFFFFFFFF, np.bincount(found >> 32, minlength=len(rows.counts))))

    def finish(self, shard: Path) -> None:
        if self.centroids is not None:
            codes, counts = (np.concatenate(part) for part in zip(*self.lists, strict=True))
            write_lists(shard, TOKEN_LISTS, codes, counts, None)
        self.lists = []


WRITERS = {DENSE: DenseWriter, LEXICAL: LexicalWriter, MULTI_VECTOR: TokenWriter}


def open_shards(
    corpus: Path, options: IndexOptions, fitted: Path | None, old: tuple[Path, Path] | None
) -> MakeShard:
    """Makes shards. fitted: what `open_samples` made. old: corpus and shards of another index with the same options and
    fit: what it has of a document that has the same id and text there is copied."""
    documents, device = Corpus(corpus), encoding_device(options)
    represent = cache(lambda: represent_with(open_embedder(options, device), "document", options))
    known, shards = (Corpus(old[0]), shards_of(old[1])) if old else (None, [])

    def known_row(row: int) -> int:
        found = known.row_of_id(documents.id(row)) if known else None
        return found if found is not None and known.text(found) == documents.text(row) else -1

    def make(number: int, folder: Path) -> Iterator[int]:
        rows = range(len(documents))[number * options.shard_size : (number + 1) * options.shard_size]
        writers = [WRITERS[kind](options, fitted, device, shards) for kind in options.representations]
        for start in range(0, len(rows), at_once(options)):
            block = rows[start : start + at_once(options)]
            sources = np.array([known_row(row) for row in block])
            is_fresh = sources < 0
            texts = [documents.text(row) for row, fresh in zip(block, is_fresh, strict=True) if fresh]
            encoded = represent()(texts) if texts else None
            for writer in writers:
                fresh = writer.encoded(encoded) if encoded else None
                kept = None if is_fresh.all() else writer.kept(sources[~is_fresh])
                writer.append(folder, merged(is_fresh, fresh, kept))
            yield len(block)
        for writer in writers:
            writer.finish(folder)

    return make
