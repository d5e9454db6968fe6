"""Vectors of texts after the model gave them: cut (Matryoshka), brought to length 1, stored in fewer bits, compared.

Everything is computed in float32: near a cosine of .9 a bfloat16 is off by .004. Nothing here imports torch.
"""

import json
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Literal

import numpy as np

from rag_retrieval.core.files import write_json

VectorPrecision = Literal["float32", "float16", "int8", "binary"]
RANGES_FILE = "int8_ranges.json"
EPSILON = 1e-12  # least length that a vector is divided by, as in torch's normalize
DISTANCES = {"euclidean": "euclidean", "manhattan": "cityblock"}  # by their names in scipy
LEVELS = 255  # steps of an int8 number


def finish(vectors: np.ndarray, dim: int | None = None, normalize: bool = True) -> np.ndarray:
    """The first `dim` numbers of each vector (None: all), then of length 1: [texts, dim], float32.

    A vector of zeros stays one. Cutting comes first, since the first numbers of a vector of length 1 are shorter.
    """
    vectors = np.asarray(vectors, np.float32)[:, :dim]
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), EPSILON) if normalize else vectors


@dataclass(frozen=True, eq=False)
class Int8Ranges:
    """Least and greatest value of each number over a sample of vectors: [dim], float32.

    normalized: whether the sample was of length 1. vectors: in the sample.
    """

    minimum: np.ndarray
    maximum: np.ndarray
    normalized: bool
    vectors: int

    @property
    def step(self) -> np.ndarray:
        """Width of one of the 256 levels; 1 where the sample has one value alone."""
        step = (self.maximum - self.minimum) / np.float32(LEVELS)
        return np.where(step == 0, np.float32(1), step)

    def save(self, file: str | PathLike) -> None:
        about = {
            "minimum": self.minimum.tolist(),
            "maximum": self.maximum.tolist(),
            "normalized": self.normalized,
            "vectors": self.vectors,
        }
        write_json(Path(file), about)

    @classmethod
    def read(cls, file: str | PathLike) -> "Int8Ranges":
        """Raises ValueError for a file that `save` did not write."""
        try:
            about = json.loads(Path(file).read_text(encoding="utf-8"))
            minimum, maximum = (np.array(about[name], np.float32) for name in ("minimum", "maximum"))
            ranges = cls(minimum, maximum, bool(about["normalized"]), int(about["vectors"]))
        except (ValueError, TypeError, KeyError) as error:
            raise ValueError(f"{file}: these are no ranges of vectors ({error}); calibrate again") from error
        if minimum.ndim != 1 or minimum.shape != maximum.shape or not (minimum <= maximum).all():
            raise ValueError(f"{file}: expected as many minima as maxima, none of them greater; calibrate again")
        return ranges


def ranges_of(vectors: np.ndarray, normalized: bool) -> Int8Ranges:
    """Of a sample: [vectors, dim]. Raises ValueError for fewer than two, and for one that is not finite."""
    if len(vectors) < 2:
        raise ValueError(f"ranges need a sample of at least 2 vectors, better 1,000; found {len(vectors)}")
    if not np.isfinite(vectors).all():
        raise ValueError("a vector of the sample is not finite; its model is damaged or overflows in half precision")
    return Int8Ranges(vectors.min(axis=0), vectors.max(axis=0), normalized, len(vectors))


def to_precision(vectors: np.ndarray, precision: VectorPrecision, ranges: Int8Ranges | None = None) -> np.ndarray:
    """Float32 vectors [texts, dim] in fewer bits.

    int8: floor((x - minimum) / step) - 128 of each number, where what lies outside the ranges takes the nearest level:
    int8 [texts, dim]. binary: a bit for each number, 1 where it is above 0, eight in a byte with the first one highest:
    uint8 [texts, dim / 8]. Both as `quantize_embeddings` of sentence-transformers ("int8", "ubinary"). ranges: for
    int8. Raises ValueError for numbers too large for float16, for binary vectors whose dim is no multiple of 8, and for
    a dim that is not that of the ranges.
    """
    if precision == "int8":
        check_dim(vectors, ranges)
        levels = np.floor((vectors - ranges.minimum) / ranges.step)
        return (np.clip(levels, 0, LEVELS) - 128).astype(np.int8)
    if precision == "binary":
        if vectors.shape[1] % 8:
            raise ValueError(f"binary vectors have eight numbers in a byte; {vectors.shape[1]} is no multiple of 8")
        return np.packbits(vectors > 0, axis=1)
    if precision == "float16" and np.abs(vectors).max(initial=0) > np.finfo(np.float16).max:
        raise ValueError("a vector has a number too large for float16; take float32, or normalize")
    return vectors.astype(precision, copy=False)


def to_float32(vectors: np.ndarray, ranges: Int8Ranges | None = None) -> np.ndarray:
    """What stored vectors of any precision stand for: [texts, dim], float32. int8: the middle of each level, by the
    ranges, ValueError without; binary: 1 and -1."""
    if vectors.dtype == np.int8:
        if ranges is None:
            raise ValueError("int8 vectors mean nothing without their ranges")
        check_dim(vectors, ranges)
        return ranges.minimum + (vectors.astype(np.float32) + 128.5) * ranges.step
    if vectors.dtype == np.uint8:
        return np.unpackbits(vectors, axis=1).astype(np.float32) * 2 - 1
    return np.asarray(vectors, np.float32)


def check_dim(vectors: np.ndarray, ranges: Int8Ranges) -> None:
    if vectors.shape[1] != len(ranges.minimum):
        raise ValueError(
            f"the vectors have {vectors.shape[1]} numbers, and the int8 ranges were calibrated for "
            f"{len(ranges.minimum)}; calibrate with dim={vectors.shape[1]}"
        )


def similarity(
    queries: np.ndarray,
    documents: np.ndarray,
    kind: str = "cosine",
    ranges: Int8Ranges | None = None,
) -> np.ndarray:
    """[queries, documents], float32, of vectors [texts, dim] in any two precisions; the greater, the nearer.

    kind, as sentence-transformers calls it: "cosine" (0 with a vector of zeros), "dot", or the negative distances
    "euclidean" and "manhattan". ranges: of int8 vectors. Raises ValueError for another kind, for arrays that are not
    two-dimensional, for two dims, and for int8 vectors without ranges of their dim.
    """
    for name, vectors in (("queries", queries), ("documents", documents)):
        if vectors.ndim != 2:
            raise ValueError(f"{name}: expected an array [texts, numbers], found one of shape {vectors.shape}")
    left, right = to_float32(queries, ranges), to_float32(documents, ranges)
    if left.shape[1] != right.shape[1]:
        raise ValueError(f"queries have {left.shape[1]} numbers and documents {right.shape[1]}; encode with one dim")
    if kind in DISTANCES:
        from scipy.spatial.distance import cdist

        return -cdist(left, right, DISTANCES[kind]).astype(np.float32)
    if kind not in ("cosine", "dot"):
        raise ValueError(f"similarity {kind!r} is not known; expected cosine, dot, {' or '.join(DISTANCES)}")
    if kind == "cosine":
        left, right = finish(left), finish(right)
    return left @ right.T
