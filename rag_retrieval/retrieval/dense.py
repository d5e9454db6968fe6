"""Vectors of a corpus in shards of memory-mapped files, and the nearest documents of queries, exactly or by FAISS.

A shard is a folder with `vectors.npy` and, with `rescore_precision`, `finer.npy`. `DenseSearch` reads them in blocks,
so that its memory does not grow with the corpus. int8 and binary vectors are decoded then, and compared with the
query's own float32 numbers: more exact than comparing bits with bits.

The best of an approximate search (FAISS, or coarse vectors beside a finer copy) are scored anew by the finest vectors
that are kept, and so is a judged document, also where it was not found.
"""

import ctypes
import os
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch

from rag_retrieval.core.log import Progress
from rag_retrieval.core.shards import MakeShard
from rag_retrieval.data.corpus import Corpus
from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.models.devices import choose_device
from rag_retrieval.models.nearest import nearest
from rag_retrieval.models.options import EmbedderOptions
from rag_retrieval.models.vectors import EPSILON, RANGES_FILE, Int8Ranges, ranges_of, to_float32, to_precision
from rag_retrieval.retrieval.candidates import Candidates
from rag_retrieval.retrieval.config import IndexOptions

Encode = Callable[[list[str]], np.ndarray]  # texts to float32 [texts, width]
VECTORS, FINER = "vectors", "finer"
ENCODED = 4096  # documents encoded and written at once
RANGES_SAMPLE = 10_000  # documents that int8 ranges are taken from
FAISS_SAMPLE = 1 << 18  # vectors that an index such as IVF is trained on
FAISS_ADDED = 1 << 14  # vectors added at once
RECALL_QUERIES, RECALL_DEPTH = 200, 10


# ---- encoding


def open_embedder(options: IndexOptions, device: str | torch.device | None = None) -> Embedder:
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


def open_ranges(device: torch.device, corpus: Path, options: IndexOptions) -> MakeShard:
    """Makes the one shard with the int8 ranges of the vectors of documents that the seed draws."""

    def make(number: int, folder: Path) -> None:
        documents = Corpus(corpus)
        rows = np.random.default_rng(options.seed).permutation(len(documents))[:RANGES_SAMPLE]
        texts = [documents.text(row) for row in np.sort(rows).tolist()]
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

    def make(number: int, folder: Path) -> None:
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


# ---- reading


class Vectors:
    """[documents, width] of all shards, mapped, in any precision. ranges: of int8."""

    def __init__(self, shards: Sequence[Path], name: str, ranges: Int8Ranges | None):
        self.parts = [np.load(shard / f"{name}.npy", mmap_mode="r") for shard in shards]
        self.ranges = ranges
        self._starts = np.cumsum([0, *map(len, self.parts)])

    def __len__(self) -> int:
        return int(self._starts[-1])

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


def open_search(
    paths: Mapping[str, Path], options: IndexOptions, encode: Encode, device: str | torch.device | None
) -> "DenseSearch":
    """device: where vectors are compared; None for the machine's own choice."""
    vectors, *finer = open_vectors(paths, options)
    index = read_faiss(paths["faiss"], options.faiss_search) if "faiss" in paths else None
    return DenseSearch(vectors, encode, choose_device(device), *finer, index=index, factor=options.rescore_factor)


class DenseSearch:
    """Candidates by inner product. encode: queries to vectors. finer: a copy of the vectors that scores the best
    anew. index: of FAISS. factor: how many are scored anew for each one asked for. Without finer and index every
    document is compared, exactly."""

    words = ""

    def __init__(
        self,
        vectors: Vectors,
        encode: Encode,
        device: str | torch.device,
        finer: Vectors | None = None,
        index=None,
        factor: int = 1,
    ):
        self.vectors, self.encode, self.device, self.index = vectors, encode, device, index
        self.finest, self.factor = finer or vectors, factor
        self.is_exact = index is None and finer is None

    def search(self, queries: Sequence[str], judged: Sequence[np.ndarray], depth: int) -> list[Candidates]:
        return self.search_vectors(self.encode(list(queries)), judged, depth)

    def search_vectors(self, queries: np.ndarray, judged: Sequence[np.ndarray], depth: int) -> list[Candidates]:
        """queries: float32 [queries, dim]."""
        wanted = min(depth if self.is_exact else depth * self.factor, len(self.vectors))
        if self.index is None:
            rows, scores = nearest(queries, self.vectors.parts, wanted, self.device, self.vectors.decode)
        else:
            scores, rows = self.index.search(np.ascontiguousarray(queries, np.float32), wanted)
        lists = []
        for query, found, found_scores, asked in zip(queries, rows, scores, judged, strict=True):
            if not self.is_exact:
                found = np.sort(found[found >= 0])  # FAISS fills up with -1 where it finds fewer
                found_scores = self.finest.rows(found) @ query
                order = np.lexsort((found, -found_scores))[:depth]
                found, found_scores = found[order], found_scores[order]
            lists.append(Candidates(found, found_scores, self.finest.rows(asked) @ query))
        return lists

    def recall(self, seed: int) -> float:
        """The part of the nearest `RECALL_DEPTH` by the finest vectors that the search finds, on average over documents
        drawn by the seed as queries. A document itself does not count."""
        drawn = np.random.default_rng(seed).permutation(len(self.vectors))[:RECALL_QUERIES]
        queries, depth = self.finest.rows(drawn), RECALL_DEPTH + 1
        exact, _ = nearest(queries, self.finest.parts, depth, self.device, self.finest.decode)
        none = [np.zeros(0, np.int64)] * len(drawn)
        found = self.search_vectors(queries, none, depth)
        pairs = zip(drawn.tolist(), exact.tolist(), found, strict=True)
        parts = [
            len(set(best) - {row} & set(candidates.rows.tolist())) / max(len(set(best) - {row}), 1)
            for row, best, candidates in pairs
        ]
        return float(np.mean(parts))


# ---- FAISS


def build_faiss(vectors: Vectors, options: IndexOptions, folder: Path) -> None:
    """Write an index by inner product into the existing folder.

    An IVF index is made shard by shard, and its lists are merged on the disk, from where they are searched, so that
    neither is bounded by memory; every other index is made and held in memory. Raises ValueError where FAISS is missing
    or cannot make such an index.
    """
    faiss = _import_faiss()
    try:
        index = faiss.index_factory(vectors.decode(vectors.parts[0][:1]).shape[1], options.faiss_index,
                                    faiss.METRIC_INNER_PRODUCT)  # fmt: skip
        if not index.is_trained:
            rows = np.random.default_rng(options.seed).permutation(len(vectors))[:FAISS_SAMPLE]
            index.train(vectors.rows(np.sort(rows)))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise ValueError(f"faiss_index {options.faiss_index!r}: FAISS cannot make this index ({reason})") from error
    with Progress(len(vectors), "indexing vectors", "documents") as progress:
        if has_lists(index):
            index = _merged_on_disk(index, vectors, folder, progress)
        else:
            for block in vectors.blocks(FAISS_ADDED):
                index.add(block)
                progress.update(len(block))
    faiss.write_index(index, str(folder / "index"))


def has_lists(index) -> bool:
    """Whether it is an IVF index whose lists can lie on the disk: one with a refinement or for "fast scan" cannot."""
    faiss = _import_faiss()
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is None or isinstance(index, faiss.IndexRefine):
        return False
    return isinstance(faiss.downcast_InvertedLists(ivf.invlists), faiss.ArrayInvertedLists)


def _merged_on_disk(index, vectors: Vectors, folder: Path, progress: Progress):
    faiss = _import_faiss()
    from faiss.contrib.ondisk import merge_ondisk

    faiss.write_index(index, str(folder / "trained"))
    row, files = 0, []
    for number, part in enumerate(vectors.parts):
        of_part = faiss.read_index(str(folder / "trained"))
        for start in range(0, len(part), FAISS_ADDED):
            block = vectors.decode(part[start : start + FAISS_ADDED])
            of_part.add_with_ids(block, np.arange(row, row + len(block)))
            row += len(block)
            progress.update(len(block))
        files.append(folder / f"part-{number}")
        faiss.write_index(of_part, str(files[-1]))
    with without_stdout():
        merge_ondisk(index, [str(file) for file in files], str(folder / "lists"))
    for file in [*files, folder / "trained"]:
        file.unlink()
    return index


def read_faiss(folder: Path, faiss_search: str | None):
    """faiss_search: parameters such as nprobe=32. Raises ValueError for one that this index does not have."""
    faiss = _import_faiss()
    with without_stdout():
        index = faiss.read_index(str(folder / "index"), faiss.IO_FLAG_ONDISK_SAME_DIR)
    ivf = faiss.try_extract_index_ivf(index)
    if ivf is not None:
        ivf.nprobe = max(1, ivf.nlist // 16)
    if faiss_search is not None:
        try:
            faiss.ParameterSpace().set_index_parameters(index, faiss_search)
        except RuntimeError as error:
            reason = " ".join(str(error).split())[-200:]
            raise ValueError(f"faiss_search {faiss_search!r}: this index takes no such parameter ({reason})") from error
    return index


@contextmanager
def without_stdout() -> Iterator[None]:
    """For calls in which FAISS prints: stdout is for the results of a command."""
    sys.stdout.flush()
    kept, nothing = os.dup(1), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    try:
        yield
    finally:
        ctypes.CDLL(None).fflush(None)  # what C has buffered goes to where it was printed to
        os.dup2(kept, 1)
        os.close(kept)
        os.close(nothing)


def _import_faiss():
    try:
        import faiss
    except ImportError:
        raise ValueError("faiss_index needs FAISS; run: pip install faiss-cpu, or leave faiss_index out") from None
    return faiss
