"""Indexes of FAISS over the vectors of a corpus, by any factory string.

An IVF index is made shard by shard, and its lists are merged on the disk, from where they are searched, so that
neither is bounded by memory. Every other index is made and held in memory: "Flat" takes 4 bytes a number.
"""

import ctypes
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from rag_retrieval.core.log import Progress
from rag_retrieval.retrieval.config import IndexOptions
from rag_retrieval.retrieval.stored_vectors import Vectors, drawn_rows

FAISS_SAMPLE = 1 << 18  # vectors that an index such as IVF is trained on
FAISS_ADDED = 1 << 14  # vectors added at once
WIDTHS = (768, 1024, 840, 1000, 3584, 3600)  # one of them is a multiple of whatever a product quantizer may divide by
LISTS_SEARCHED = 16  # by default one of so many


def check_faiss(options: IndexOptions) -> None:
    """Before anything is encoded: ValueError where FAISS is missing, where it makes no such index of vectors of any of
    `WIDTHS`, and where the index takes no such parameters."""
    faiss, errors = _import_faiss(), []
    for width in [options.dim] if options.dim else WIDTHS:
        try:
            index = make_empty(width, options.faiss_index)
        except ValueError as error:
            errors.append(error)
        else:
            return set_parameters(faiss, index, options.faiss_search)
    raise errors[0]


def make_empty(width: int, name: str):
    faiss = _import_faiss()
    try:
        return faiss.index_factory(width, name, faiss.METRIC_INNER_PRODUCT)
    except RuntimeError as error:
        raise ValueError(f"faiss_index {name!r}: FAISS cannot make this index ({reason_of(error)})") from error


def reason_of(error: RuntimeError) -> str:
    return " ".join(str(error).split())[-200:]


def build_faiss(vectors: Vectors, options: IndexOptions, folder: Path) -> None:
    """Write an index by inner product into the existing folder. Raises ValueError where FAISS is missing or cannot make
    such an index."""
    faiss, name = _import_faiss(), options.faiss_index
    index = make_empty(vectors.dim, name)
    if not index.is_trained:
        try:
            index.train(vectors.rows(drawn_rows(len(vectors), FAISS_SAMPLE, options.seed)))
        except RuntimeError as error:
            raise ValueError(f"faiss_index {name!r}: FAISS cannot train this index ({reason_of(error)})") from error
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
        ivf.nprobe = max(1, ivf.nlist // LISTS_SEARCHED)
    set_parameters(faiss, index, faiss_search)
    return index


def set_parameters(faiss, index, names: str | None) -> None:
    if names is not None:
        try:
            faiss.ParameterSpace().set_index_parameters(index, names)
        except RuntimeError as error:
            reason = reason_of(error)
            raise ValueError(f"faiss_search {names!r}: this index takes no such parameter ({reason})") from error


def search_faiss(index, queries: np.ndarray, depth: int, among: np.ndarray | None) -> np.ndarray:
    """Rows of the nearest: int64 [queries, depth], -1 where fewer are found, and all -1 where this kind of index cannot
    search among a part. among: int64 rows that may be found; None for all."""
    queries = np.ascontiguousarray(queries, np.float32)
    if among is None:
        return index.search(queries, depth)[1]
    faiss, is_among = _import_faiss(), np.zeros(index.ntotal, bool)
    is_among[among] = True
    selector = faiss.IDSelectorBitmap(np.packbits(is_among, bitorder="little"))
    try:
        rows = index.search(queries, depth, params=search_parameters(faiss, index, selector))[1]
    except RuntimeError:
        return np.full((len(queries), depth), -1)
    return np.where((rows >= 0) & is_among[rows], rows, -1)  # some kinds of index do not look at a selector


def search_parameters(faiss, index, selector):
    """Those that the index has, with the selector: what is not said here would be FAISS's default."""
    index = faiss.downcast_index(index)
    if isinstance(index, faiss.IndexPreTransform):
        return faiss.SearchParametersPreTransform(index_params=search_parameters(faiss, index.index, selector))
    if isinstance(index, faiss.IndexRefine):
        inner = search_parameters(faiss, index.base_index, selector)
        return faiss.IndexRefineSearchParameters(k_factor=index.k_factor, base_index_params=inner)
    if isinstance(index, faiss.IndexIVF):
        return faiss.SearchParametersIVF(sel=selector, nprobe=index.nprobe, max_codes=index.max_codes)
    if isinstance(index, faiss.IndexHNSW):
        own = index.hnsw
        return faiss.SearchParametersHNSW(
            sel=selector, efSearch=own.efSearch, check_relative_distance=own.check_relative_distance,
            bounded_queue=own.search_bounded_queue,
        )  # fmt: skip
    return faiss.SearchParameters(sel=selector)


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
