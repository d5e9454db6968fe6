"""Vectors of a corpus in shards of memory-mapped files, in any precision, and how they get there.

A shard is a folder with `vectors.npy` and, with `rescore_precision`, `finer.npy`.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
import torch

from rag_retrieval.core.shard_folder import MakeShard
from rag_retrieval.data.corpus import Corpus
from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.models.options import EmbedderOptions
from rag_retrieval.models.vectors import EPSILON, RANGES_FILE, Int8Ranges, ranges_of, to_float32, to_precision
from rag_retrieval.retrieval.config import IndexOptions

Encode = Callable[[list[str]], np.ndarray]  # texts to float32 [texts, width]
VECTORS, FINER = "vectors", "finer"
ENCODED = 4096  # documents encoded and written at once
RANGES_SAMPLE = 10_000  # documents that int8 ranges are taken from


class Vectors:
    """[documents, width] of all shards, mapped, in any precision. ranges: of int8."""

    def __init__(self, shards: Sequence[Path], name: str, ranges: Int8Ranges | None):
        self.parts = [open_array(shard / f"{name}.npy") for shard in shards]
        self.ranges = ranges
        self._starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

    @property
    def dim(self) -> int:
        return self.decode(self.parts[0][:1]).shape[1]

    def stored(self, rows: np.ndarray) -> np.ndarray:
        """As they are kept."""
        found = np.empty((len(rows), self.parts[0].shape[1]), self.parts[0].dtype)
        part_of = np.searchsorted(self._starts, rows, side="right") - 1
        for part in np.unique(part_of).tolist():
            found[part_of == part] = self.parts[part][rows[part_of == part] - self._starts[part]]
        return found

    def rows(self, rows: np.ndarray) -> np.ndarray:
        """float32 [rows, dim]"""
        return self.decode(self.stored(rows))

    def decode(self, block: np.ndarray) -> np.ndarray:
        return block.astype(np.float32) if block.dtype.kind == "f" else to_float32(block, self.ranges)

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """All, as float32, `size` at a time; a block ends with its shard."""
        for part in self.parts:
            for start in range(0, len(part), size):
                yield self.decode(part[start : start + size])

    def similarity(self, one: np.ndarray, other: np.ndarray) -> float:
        """The cosine of two float32 vectors, after the first lost what this precision loses."""
        kept = self.decode(to_precision(one[None], precision_of(self.parts[0]), self.ranges))[0]
        return float(kept @ other / max(np.linalg.norm(kept) * np.linalg.norm(other), EPSILON))


def open_array(file: Path) -> np.ndarray:
    """Mapped. Raises ValueError that names the file."""
    try:
        return np.load(file, mmap_mode="r")
    except ValueError as error:
        found = f"{file}: this is no file of vectors ({error})"
        raise ValueError(f"{found}; the index is damaged: copy it again, or build it again") from error


def precision_of(stored: np.ndarray) -> str:
    return {"uint8": "binary"}.get(str(stored.dtype), str(stored.dtype))


def shards_of(folder: Path) -> list[Path]:
    return sorted(folder.glob("shard-*"))


def read_ranges(part: Path | None) -> Int8Ranges | None:
    return part and Int8Ranges.read(shards_of(part)[0] / RANGES_FILE)


def open_vectors(paths: Mapping[str, Path], options: IndexOptions) -> list[Vectors]:
    """The vectors that are searched and, where there is one, the finer copy. paths: of the parts of an index."""
    ranges = read_ranges(paths.get("ranges"))
    return [Vectors(shards_of(paths["vectors"]), name, ranges) for name in precisions(options)]


# ---- encoding


def open_embedder(options: IndexOptions, device: torch.device | None = None) -> Embedder:
    """With every option that was given. device: where the options name none."""
    given = options.given(*EmbedderOptions.model_fields)
    if device is not None and not given.keys() & {"device", "devices"}:
        given["device"] = device
    return Embedder(options.embedder, **given)


def encode_with(embedder: Embedder, kind: str, options: IndexOptions) -> Encode:
    """To vectors whose inner product is the similarity that the model asks for.

    Raises ValueError for a model that asks for a distance, unless its vectors have length 1.
    """
    settings = embedder.settings
    if settings.similarity not in ("cosine", "dot") and not settings.normalize:
        raise ValueError(
            f"embedder: this model compares vectors by the {settings.similarity} distance, and an index by their inner "
            "product; say normalize: true to compare by angle"
        )
    normalize = settings.normalize or settings.similarity == "cosine" and options.normalize is None
    shape = {"batch_size": options.batch_size, "dim": options.dim, "normalize": normalize}
    return lambda texts: embedder.encode(texts, kind=kind, show_progress_bar=False, **shape)


def drawn_rows(count: int, most: int, seed: int) -> np.ndarray:
    """At most so many of the rows, each once, rising."""
    # a permutation of 100 million rows would take 800 MB
    return np.sort(np.random.default_rng(seed).choice(count, min(most, count), replace=False, shuffle=False))


def open_ranges(device: torch.device, corpus: Path, options: IndexOptions) -> MakeShard:
    """Makes the one shard with the int8 ranges of the vectors of documents that the seed draws."""

    def make(number: int, folder: Path) -> None:
        documents = Corpus(corpus)
        rows = drawn_rows(len(documents), RANGES_SAMPLE, options.seed)
        texts = [documents.text(row) for row in rows.tolist()]
        vectors = encode_with(open_embedder(options, device), "document", options)(texts)
        normalized = bool(np.allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-3))
        sample = np.resize(vectors, (max(len(texts), 2), vectors.shape[1]))  # of one document twice the same
        ranges_of(sample, normalized).save(folder / RANGES_FILE)

    return make


def open_shards(
    device: torch.device, corpus: Path, options: IndexOptions, ranges: Path | None, old: tuple[Path, list[Path]] | None
) -> MakeShard:
    """Makes shards of vectors. ranges: the part of the index that `open_ranges` made. old: a corpus and its shards, in
    the same precisions: the vector of a document that has the same id and text there is copied."""
    documents = Corpus(corpus)
    int8_ranges = read_ranges(ranges)
    encode = cache(lambda: encode_with(open_embedder(options, device), "document", options))
    known = old and Corpus(old[0])
    copies = {name: Vectors(old[1], name, int8_ranges) for name in precisions(options)} if old else {}

    def known_row(row: int) -> int:
        found = known.row_of_id(documents.id(row)) if known else None
        return found if found is not None and known.text(found) == documents.text(row) else -1

    def make(number: int, folder: Path) -> Iterator[int]:
        rows = range(len(documents))[number * options.shard_size : (number + 1) * options.shard_size]
        files = {name: folder / f"{name}.npy" for name in precisions(options)}
        for start in range(0, len(rows), ENCODED):
            block = rows[start : start + ENCODED]
            sources = np.array([known_row(row) for row in block])
            texts = [documents.text(row) for row, source in zip(block, sources, strict=True) if source < 0]
            encoded = encode()(texts) if texts else None
            for name, precision in precisions(options).items():
                fresh = None if encoded is None else to_precision(encoded, precision, int8_ranges)
                kept = copies[name].stored(sources[sources >= 0]) if copies else None
                append_vectors(files[name], _merged(sources < 0, fresh, kept), len(rows))
            yield len(block)

    return make


def _merged(is_fresh: np.ndarray, fresh: np.ndarray | None, kept: np.ndarray | None) -> np.ndarray:
    if fresh is None or kept is None:
        return kept if fresh is None else fresh
    merged = np.empty((len(is_fresh), fresh.shape[1]), fresh.dtype)
    merged[is_fresh], merged[~is_fresh] = fresh, kept
    return merged


def precisions(options: IndexOptions) -> dict[str, str]:
    """Of the copies of the vectors."""
    finer = {FINER: options.rescore_precision} if options.rescore_precision else {}
    return {VECTORS: options.vector_precision} | finer


def append_vectors(file: Path, block: np.ndarray, count: int) -> None:
    """To an .npy file of `count` vectors in all. Written, not mapped: a full disk would be a SIGBUS there."""
    with file.open("ab") as stream:
        if stream.tell() == 0:
            header = {"descr": block.dtype.str, "fortran_order": False, "shape": (count, block.shape[1])}
            np.lib.format.write_array_header_1_0(stream, header)
        stream.write(block.tobytes())
