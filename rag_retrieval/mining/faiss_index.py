"""An index of FAISS over the vectors of a corpus, kept in a file: faster than comparing with all, and not exact.

The trap: FAISS holds the whole index in memory; "Flat" takes 4 bytes a number, 1.5 GB for 1,000,000 documents of
width 384, where the exact search over the mapped file takes some hundred MB.
"""

from pathlib import Path

import numpy as np

from rag_retrieval.core.progress import Progress

SAMPLE = 1 << 18  # vectors that an index such as IVF is trained on
ADDED = 1 << 14  # vectors added at once


def build_faiss(vectors: np.ndarray, factory: str, seed: int, folder: Path) -> None:
    """Write an index by inner product into the existing folder. factory: such as "Flat" or "IVF1024,Flat".

    Raises ValueError where FAISS is missing or cannot make such an index.
    """
    faiss = _import_faiss()
    try:
        index = faiss.index_factory(vectors.shape[1], factory, faiss.METRIC_INNER_PRODUCT)
        if not index.is_trained:
            rows = np.random.default_rng(seed).permutation(len(vectors))[:SAMPLE]
            index.train(vectors[np.sort(rows)].astype(np.float32))
    except RuntimeError as error:
        reason = " ".join(str(error).split())[-200:]
        raise ValueError(f"faiss_index {factory!r}: FAISS cannot make this index ({reason})") from error
    with Progress(len(vectors), "indexing vectors", "documents") as progress:
        for start in range(0, len(vectors), ADDED):
            block = vectors[start : start + ADDED].astype(np.float32)
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
