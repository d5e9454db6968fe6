"""Vectors in shards of memory-mapped files.

How they are kept is a codec: `encode` makes stored rows of float32 vectors, `decode` gives back what they stand for.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from rag_retrieval.models.vectors import EPSILON, Int8Ranges, to_float32, to_precision


class Codec(Protocol):
    def encode(self, vectors: np.ndarray) -> np.ndarray:
        """float32 [rows, dim] as stored rows."""

    def decode(self, stored: np.ndarray) -> np.ndarray:
        """float32 [rows, dim]"""


@dataclass(frozen=True, eq=False)
class NumberCodec:
    """Numbers of `models.vectors.VectorPrecision`. ranges: of int8."""

    precision: str
    ranges: Int8Ranges | None = None

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        return to_precision(vectors, self.precision, self.ranges)

    def decode(self, stored: np.ndarray) -> np.ndarray:
        return stored.astype(np.float32) if stored.dtype.kind == "f" else to_float32(stored, self.ranges)


def drawn_rows(count: int, most: int, seed: int) -> np.ndarray:
    """At most so many of the rows, each once, rising."""
    # a permutation of 100 million rows would take 800 MB
    return np.sort(np.random.default_rng(seed).choice(count, min(most, count), replace=False, shuffle=False))


# ---- files


class Vectors:
    """[rows, dim] of all shards, mapped, as `codec` keeps them. name: of the file in each shard."""

    def __init__(self, shards: Sequence[Path], name: str, codec: Codec):
        self.parts = [open_array(shard / f"{name}.npy") for shard in shards]
        self.codec, self.decode = codec, codec.decode
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

    def blocks(self, size: int) -> Iterator[np.ndarray]:
        """All, as float32, `size` at a time; a block ends with its shard."""
        for part in self.parts:
            for start in range(0, len(part), size):
                yield self.decode(part[start : start + size])

    def similarity(self, vectors: np.ndarray, stored: np.ndarray) -> float:
        """The mean cosine of float32 vectors and others that were read here, after the first lost what they lost."""
        kept = self.decode(self.codec.encode(vectors))
        lengths = np.linalg.norm(kept, axis=1) * np.linalg.norm(stored, axis=1)
        return float(((kept * stored).sum(axis=1) / np.maximum(lengths, EPSILON)).mean())


def open_array(file: Path) -> np.ndarray:
    """Mapped. Raises ValueError that names the file."""
    try:
        return np.load(file, mmap_mode="r")
    except ValueError as error:
        found = f"{file}: this is no file of vectors ({error})"
        raise ValueError(f"{found}; the index is damaged: copy it again, or build it again") from error


def append_vectors(file: Path, block: np.ndarray) -> None:
    """To an .npy file, which is made where it is not there. Written, not mapped: a full disk would be a SIGBUS there.
    The header with the new count takes the old one's place, for which numpy leaves room."""
    count = len(np.load(file, mmap_mode="r")) if file.exists() else 0
    with file.open("r+b" if file.exists() else "w+b") as stream:
        header = {"descr": block.dtype.str, "fortran_order": False, "shape": (count + len(block), *block.shape[1:])}
        np.lib.format.write_array_header_1_0(stream, header)
        stream.seek(0, 2)
        stream.write(block.tobytes())
