"""Vectors of a corpus in shards of memory-mapped files, and the nearest documents of queries, exactly or by FAISS.

A shard is a folder with `vectors.npy` and, with `rescore_precision`, `finer.npy`. `DenseSearch` reads them in blocks,
so that its memory does not grow with the corpus. int8 and binary vectors are decoded then, and compared with the
query's own float32 numbers: more exact than comparing bits with bits.

The best of an approximate search (FAISS, or coarse vectors beside a finer copy) are scored anew by the finest vectors
that are kept, and so is a judged document, also where it was not found.
"""

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from rag_retrieval.core.log import Progress
from rag_retrieval.data.corpus import Corpus
from rag_retrieval.infer.embedder import Embedder
from rag_retrieval.models.devices import choose_device
from rag_retrieval.models.nearest import nearest
from rag_retrieval.models.options import EmbedderOptions
from rag_retrieval.models.vectors import RANGES_FILE, Int8Ranges, ranges_of, to_float32, to_precision
from rag_retrieval.retrieval.candidates import Candidates
from rag_retrieval.retrieval.config import IndexOptions

Encode = Callable[[list[str]], np.ndarray]  # texts to float32 [texts, width]
ENCODED = 4096  # documents encoded and written at once
RANGES_SAMPLE = 10_000  # documents that int8 ranges are taken from
FAISS_SAMPLE = 1 << 18  # vectors that an index such as IVF is trained on
FAISS_ADDED = 1 << 14  # vectors added at once
VECTORS, FINER = "vectors", "finer"
RECALL_QUERIES, RECALL_DEPTH = 200, 10


# ---- the embedder of an index


def open_embedder(options: IndexOptions, device: str | None = None) -> Embedder:
    """With every option that was given. device: in place of the options'."""
    given = options.given(*EmbedderOptions.model_fields)
    if device is not None:
        given = {name: value for name, value in given.items() if name != "devices"} | {"device": device}
    return Embedder(options.embedder, **given)


def normalizes(embedder: Embedder) -> bool:
    """Whether vectors are made to length 1, so that the inner product is the similarity that the model asks for.

    Raises ValueError for a distance of vectors that have no length of 1.
    """
    settings = embedder.model.settings
    if settings.similarity not in ("cosine", "dot") and not settings.normalize:
        raise ValueError(
            f"embedder: this model compares vectors by the {settings.similarity} distance, and an index by inner "
            "product; set normalize: true to compare by angle"
        )
    return settings.normalize or settings.similarity == "cosine"


def encode_with(embedder: Embedder, kind: str, options: IndexOptions) -> Encode:
    shape = {"batch_size": options.batch_size, "dim": options.dim, "normalize": normalizes(embedder)}
    return lambda texts: embedder.encode(texts, kind=kind, show_progress_bar=False, **shape)


# ---- shards


def sample_ranges(corpus: Corpus, encode: Encode, normalized: bool, seed: int) -> Int8Ranges:
    """Of the vectors of documents drawn by the seed."""
    rows = np.random.default_rng(seed).permutation(len(corpus))[:RANGES_SAMPLE]
    texts = [corpus.text(row) for row in np.sort(rows).tolist()]
    vectors = encode(texts if len(texts) > 1 else texts * 2)  # of one document each number has one value
    return ranges_of(vectors, normalized)


def write_shard(texts: Iterator[np.ndarray], count: int, folder: Path, options: IndexOptions, ranges) -> None:
    """texts: blocks of float32 vectors, `count` in all."""
    copies = {VECTORS: options.vector_precision}
    if options.rescore_precision:
        copies[FINER] = options.rescore_precision
    files = {name: (folder / f"{name}.npy").open("wb") for name in copies}
    try:
        for start, block in texts:
            for name, precision in copies.items():
                stored = to_precision(block, precision, ranges)
                if start == 0:
                    header = {"descr": stored.dtype.str, "fortran_order": False, "shape": (count, stored.shape[1])}
                    np.lib.format.write_array_header_1_0(files[name], header)
                files[name].write(stored.tobytes())
    finally:
        for file in files.values():
            file.close()
