"""Vectors of a corpus in one memory-mapped file, and the nearest documents of queries, exactly or by FAISS.

`build_vectors` appends block by block and continues where a killed run stopped. `DenseSearch` reads the file in
blocks, so that its memory does not grow with the corpus. An index of FAISS is held in memory: "Flat" takes 4 bytes a
number, 1.5 GB for 1,000,000 documents of width 384.

A judged document is scored by its own vector, also where it was not found. With FAISS the score of a found document
may be an approximation.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from rag_retrieval.core.log import Progress
from rag_retrieval.data.corpus import Corpus
from rag_retrieval.models.nearest import nearest
from rag_retrieval.retrieval.candidates import Candidates

Encode = Callable[[list[str]], np.ndarray]  # texts to float32 [texts, width]
ENCODED = 4096  # documents encoded and written at once; what a killed run loses at most
FAISS_SAMPLE = 1 << 18  # vectors that an index such as IVF is trained on
FAISS_ADDED = 1 << 14  # vectors added at once


def build_vectors(corpus: Corpus, encode: Encode, folder: Path, dtype: str) -> None:
    """Write the vectors of all documents into the existing folder, after those that already stand there.

    dtype: float16 or float32. The folder is complete when it has `shape.json`.
    """
    file = folder / "vectors"
    width = encode(["a"]).shape[1]
    size = width * np.dtype(dtype).itemsize * ENCODED  # bytes of a whole block
    done = file.stat().st_size // size if file.exists() else 0
    with file.open("ab") as stream, Progress(len(corpus), "encoding", "documents", done * ENCODED) as progress:
        stream.truncate(done * size)  # a block half written when the run was killed
        for texts in corpus.blocks(ENCODED, done * ENCODED):
            vectors = encode(texts)
            if not np.isfinite(vectors).all():
                raise ValueError("the dense model gave a vector that is not finite; its weights are damaged")
            stream.write(vectors.astype(dtype).tobytes())
            stream.flush()
            progress.update(len(texts))
    (folder / "shape.json").write_text(json.dumps({"width": width, "dtype": dtype}))


def open_vectors(folder: Path) -> np.ndarray:
    """[documents, width], mapped from the file."""
    shape = json.loads((folder / "shape.json").read_text())
    vectors = np.memmap(folder / "vectors", shape["dtype"], "r")
    return np.asarray(vectors).reshape(-1, shape["width"])


class DenseSearch:
    """Candidates by inner product. index: of FAISS; None compares with every document."""

    words = ""

    def __init__(self, vectors: np.ndarray, encode: Encode, device: str, index=None):
        self.vectors, self.encode, self.device, self.index = vectors, encode, device, index

    def search(self, queries: Sequence[str], judged: Sequence[np.ndarray], depth: int) -> list[Candidates]:
        encoded = self.encode(list(queries))
        depth = min(depth, len(self.vectors))
        if self.index is None:
            rows, scores = nearest(encoded, self.vectors, depth, self.device)
        else:
            scores, rows = self.index.search(np.ascontiguousarray(encoded, np.float32), depth)
        lists = []
        for place, of_query in enumerate(judged):
            judged_scores = self.vectors[of_query].astype(np.float32) @ encoded[place]
            filled = rows[place] >= 0  # FAISS fills up with -1 where it finds fewer
            lists.append(Candidates(rows[place][filled], scores[place][filled], judged_scores))
        return lists


def build_faiss(vectors: np.ndarray, factory: str, seed: int, folder: Path) -> None:
    """Write an index by inner product into the existing folder. factory: such as "Flat" or "IVF1024,Flat".

    Raises ValueError where FAISS is missing or cannot make such an index.
    """
    faiss = _import_faiss()
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            rows = np.random.default_rng(seed).permutation(len(vectors))[:FAISS_SAMPLE]
            index.train(vectors[np.sort(rows)].astype(np.float32))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise ValueError(f"faiss_index {factory!r}: FAISS cannot make this index ({reason})") from error
    with Progress(len(vectors), "indexing vectors", "documents") as progress:
        for start in range(0, len(vectors), FAISS_ADDED):
            block = vectors[start : start + FAISS_ADDED].astype(np.float32)
            index.add(block)
            progress.update(len(block))
    faiss.write_index(index, str(folder / "index"))


def read_faiss(folder: Path):
    return _import_faiss().read_index(str(folder / "index"))


def _import_faiss():
    try:
        import faiss
    except ImportError:
        raise ValueError("faiss_index needs FAISS; run: pip install faiss-cpu, or leave faiss_index out") from None
    return faiss
