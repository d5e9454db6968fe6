"""Vectors of a corpus in files of several processes: corpus_embeddings_rank0.npy, corpus_embeddings_rank1.npy, ...

The documents follow each other in the order of the corpus over the files in the order of their numbers, so that rank 10
comes after rank 9. Nothing in such a file says what it was made from: rows, width and dtype are all that is checked.
"""

import logging
import re
from pathlib import Path

import numpy as np
import torch

from rag_retrieval.core.distributed import on_all, on_main, process_count, process_index
from rag_retrieval.core.files import atomic_write
from rag_retrieval.models.nearest import nearest
from rag_retrieval.retrieval.candidates import Candidates
from rag_retrieval.retrieval.encoding import Encode

logger = logging.getLogger(__name__)

NAME = re.compile(r"corpus_embeddings_rank(\d+)\.npy")


class Documents:
    """A corpus in memory, as `Corpus` is one on disk. documents: texts by id."""

    def __init__(self, documents: dict[str, str]):
        self.ids, self.texts = list(documents), list(documents.values())
        self.rows = {id_: row for row, id_ in enumerate(self.ids)}

    def id(self, row: int) -> str:
        return self.ids[row]

    def text(self, row: int) -> str:
        return self.texts[row]

    def row_of_id(self, id_: str) -> int | None:
        return self.rows.get(id_)


def document_vectors(folder: Path, texts: list[str], encode: Encode, width: int) -> list[np.ndarray]:
    """The files' vectors, mapped, each float [documents, width]; where the folder has none, every process encodes its
    share of the texts and writes it. Raises ValueError as `read_vectors`."""
    if on_main(lambda: not rank_files(folder)):
        on_main(lambda: folder.mkdir(parents=True, exist_ok=True))
        on_all(lambda: write_vectors(folder, texts, encode))
    else:
        logger.info("%s: vectors of the corpus are taken from there", folder)
    return on_all(lambda: read_vectors(folder, len(texts), width))


def write_vectors(folder: Path, texts: list[str], encode: Encode) -> None:
    rank, count = process_index(), process_count()
    start, end = (len(texts) * place // count for place in (rank, rank + 1))
    vectors = encode(texts[start:end])
    with atomic_write(folder / f"corpus_embeddings_rank{rank}.npy") as temporary, temporary.open("wb") as file:
        np.save(file, vectors)


def rank_files(folder: Path) -> list[Path]:
    """By number, not by name: rank 2 before rank 10."""
    files = [(int(found[1]), path) for path in folder.glob("*.npy") if (found := NAME.fullmatch(path.name))]
    return [path for _, path in sorted(files)]


def read_vectors(folder: Path, documents: int, width: int) -> list[np.ndarray]:
    """Raises ValueError for a file that is none, for one that lacks in the row of numbers, for another dtype or width
    than the first or than the model has, and for more or fewer rows than documents."""
    files = rank_files(folder)
    numbers = [int(NAME.fullmatch(file.name)[1]) for file in files]
    if missing := [number for number in range(numbers[-1] + 1) if number not in numbers]:
        raise ValueError(f"{folder}: found no corpus_embeddings_rank{missing[0]}.npy, but one of rank {numbers[-1]}; "
                         "copy all files")  # fmt: skip
    parts = [read_part(file) for file in files]
    for file, part in zip(files, parts, strict=True):
        if part.shape[1] != width:
            raise ValueError(f"{file}: the vectors have {part.shape[1]} numbers, and those of the model {width}; "
                             "encode the corpus with this model")  # fmt: skip
        if part.dtype != parts[0].dtype:
            raise ValueError(f"{file}: the numbers are {part.dtype}, and {parts[0].dtype} in {files[0].name}; encode "
                             "the corpus again")  # fmt: skip
    if (rows := sum(map(len, parts))) != documents:
        raise ValueError(f"{folder}: found {rows:,} vectors in {len(files)} files for {documents:,} documents; encode "
                         "this corpus again into another folder")  # fmt: skip
    return parts


def read_part(file: Path) -> np.ndarray:
    try:
        part = np.load(file, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"{file}: not an array that numpy.save wrote ({error}); encode the corpus again") from error
    if part.ndim != 2 or part.dtype.kind != "f":
        raise ValueError(f"{file}: expected float vectors [documents, width], found {part.dtype} {part.shape}")
    return part


def search_vectors(
    queries: np.ndarray, parts: list[np.ndarray], depth: int, device: str | torch.device
) -> list[Candidates]:
    """The documents of the greatest inner products, exactly. queries: float32 [queries, width]."""
    rows, scores = nearest(queries, parts, depth, device)
    none = np.zeros(0, np.float32)
    return [Candidates(found, of_query, none) for found, of_query in zip(rows, scores, strict=True)]
