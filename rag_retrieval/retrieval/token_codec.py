"""Token vectors in few bytes: residual codes and int8, fitted to a sample, and what a search loses by them.

The folder of a fit has `centroids.npy` (float32 [centroids, width]) where vectors are kept as residual codes, or found
by centroids, `buckets.npy` of residual codes (cutoffs, then values), `token_ranges.json` of int8, and
`token_loss.json`.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rag_retrieval.core.files import read_json, write_json
from rag_retrieval.metrics import Ranking, metric_value
from rag_retrieval.models.arrays import on_device, on_host
from rag_retrieval.models.vectors import Int8Ranges, finish, ranges_of
from rag_retrieval.retrieval.candidates import part_found
from rag_retrieval.retrieval.config import RESIDUAL_BITS, IndexOptions
from rag_retrieval.retrieval.stored_vectors import Codec, NumberCodec, open_array
from rag_retrieval.retrieval.token_vectors import (
    ASKED,
    BLOCK,
    MEASURED_DEPTH,
    MEASURED_QUERIES,
    MEASURED_TOKENS,
    TokenVectors,
    maxsim,
)

if TYPE_CHECKING:
    import torch

CODE = np.dtype("<i4")  # of a centroid
CENTROIDS_FILE, BUCKETS_FILE, RANGES_FILE = "centroids.npy", "buckets.npy", "token_ranges.json"
LOSS_FILE = "token_loss.json"
KMEANS_ROUNDS = 4
PER_CENTROID = 16  # vectors of the sample, at least
COMPARED = 1 << 10  # vectors compared with all centroids at once
QUANTILE_VECTORS = 1 << 16  # of the sample


@dataclass(frozen=True, eq=False)
class ResidualCodec:
    """The nearest centroid, and of each number's distance to the centroid's the bucket: 1, 2 or 4 bits (ColBERTv2,
    https://arxiv.org/abs/2112.01488, section 3.3).

    centroids: float32 [centroids, dim], of length 1. cutoffs: float32 [2^bits - 1], between the buckets, rising.
    values: float32 [2^bits], what a bucket stands for. device: where centroids are searched.

    A stored row is uint8: the centroid in the first four bytes, then the buckets of all numbers, the first number in a
    byte's lowest bits. A decoded vector has length 1.
    """

    centroids: np.ndarray
    cutoffs: np.ndarray
    values: np.ndarray
    device: "str | torch.device" = "cpu"

    @property
    def bits(self) -> int:
        return len(self.values).bit_length() - 1

    def encode(self, vectors: np.ndarray) -> np.ndarray:
        codes = nearest_centroids(vectors, self.centroids, self.device)
        buckets = np.searchsorted(self.cutoffs, vectors - self.centroids[codes]).astype(np.uint8)
        return np.concatenate([codes.astype(CODE)[:, None].view(np.uint8), pack(buckets, self.bits)], axis=1)

    def decode(self, stored: np.ndarray) -> np.ndarray:
        centroids = self.centroids[self.codes(stored)]
        residuals = self._values_of_bytes()[stored[:, CODE.itemsize :]]
        width = residuals.shape[1] * residuals.shape[2]
        return finish(centroids + residuals.reshape(len(stored), width)[:, : centroids.shape[1]])

    def codes(self, stored: np.ndarray) -> np.ndarray:
        """The centroid of each stored row: int32 [rows]."""
        return np.ascontiguousarray(stored[:, : CODE.itemsize]).view(CODE)[:, 0]

    def _values_of_bytes(self) -> np.ndarray:
        """What the buckets in each of the 256 bytes stand for: float32 [256, 8 / bits]."""
        shifts = np.arange(0, 8, self.bits)
        return self.values[np.arange(256)[:, None] >> shifts & (1 << self.bits) - 1]


def pack(buckets: np.ndarray, bits: int) -> np.ndarray:
    """uint8 [rows, numbers], each below 2^bits, as uint8 [rows, ceil(numbers x bits / 8)]."""
    per_byte = 8 // bits
    padded = np.pad(buckets, ((0, 0), (0, -buckets.shape[1] % per_byte)))
    of_bytes = padded.reshape(len(buckets), padded.shape[1] // per_byte, per_byte)
    return np.bitwise_or.reduce(of_bytes << np.arange(0, 8, bits, dtype=np.uint8), axis=2)


def fit_residuals(sample: np.ndarray, centroids: np.ndarray, bits: int, device: "str | torch.device") -> ResidualCodec:
    """Cutoffs and values are quantiles of the distances of numbers to the centroid's, over the first vectors of the
    sample: float32 [vectors, dim], in no order."""
    sample = sample[:QUANTILE_VECTORS]
    residuals = sample - centroids[nearest_centroids(sample, centroids, device)]
    buckets = 1 << bits
    cutoffs = np.quantile(residuals, np.arange(1, buckets) / buckets).astype(np.float32)
    values = np.quantile(residuals, (np.arange(buckets) + 0.5) / buckets).astype(np.float32)
    return ResidualCodec(centroids, cutoffs, values, device)


def fit_centroids(sample: np.ndarray, count: int, seed: int, device: "str | torch.device" = "cpu") -> np.ndarray:
    """Spherical k-means: float32 [centroids, dim], of length 1, as many as `count` or as the sample has vectors for.

    sample: float32 [vectors, dim], of length 1. It begins with vectors that the seed draws; a centroid that is nearest
    to none stays where it was.
    """
    count = max(1, min(count, len(sample) // PER_CENTROID))
    centroids = sample[np.random.default_rng(seed).choice(len(sample), count, replace=False)]
    for _ in range(KMEANS_ROUNDS):
        codes = nearest_centroids(sample, centroids, device)
        order = np.argsort(codes, kind="stable")
        found, starts = np.unique(codes[order], return_index=True)
        centroids = centroids.copy()
        centroids[found] = finish(np.add.reduceat(sample[order], starts))
    return centroids


def nearest_centroids(vectors: np.ndarray, centroids: np.ndarray, device: "str | torch.device") -> np.ndarray:
    """int64 [vectors], by the inner product."""
    asked, found = on_device(centroids, device), [np.zeros(0, np.int64)]
    for start in range(0, len(vectors), COMPARED):
        given = on_device(np.asarray(vectors[start : start + COMPARED], np.float32), device)
        found.append(on_host((given @ asked.T).argmax(1)))
    return np.concatenate(found)


def fit(sample: TokenVectors, documents: int, options: IndexOptions, device: str, folder: Path) -> None:
    """Write what `read_codec` and `read_centroids` read. sample: of whole documents in no order. documents: of the
    corpus, whose number of tokens decides on that of the centroids, about 16 sqrt(tokens) as for ColBERTv2. Raises
    ValueError for centroids of a sample without a vector."""
    vectors, precision = sample.vectors, options.token_precision
    if options.has_centroids:
        if not len(vectors):
            raise ValueError(
                f"{len(sample.counts):,} documents have no token vector, and centroids are fitted to theirs; give "
                "token_precision float16 and token_candidates all, or other documents"
            )
        tokens = len(vectors) / len(sample.counts) * documents
        count = 1 << int(math.log2(max(1, 16 * math.sqrt(tokens))))
        centroids = fit_centroids(vectors, count, options.seed, device)
        np.save(folder / CENTROIDS_FILE, centroids)
    if precision in RESIDUAL_BITS:
        fitted = fit_residuals(vectors, centroids, RESIDUAL_BITS[precision], device)
        np.save(folder / BUCKETS_FILE, np.concatenate([fitted.cutoffs, fitted.values]))
    elif precision == "int8":
        ranges_of(np.resize(vectors, (max(len(vectors), 2), vectors.shape[1])), normalized=True).save(
            folder / RANGES_FILE
        )
    if precision == "int8" or precision in RESIDUAL_BITS:
        write_json(folder / LOSS_FILE, loss_of(read_codec(folder, precision, device), sample, device))


def read_codec(folder: Path | None, precision: str, device: "str | torch.device") -> Codec:
    """folder: of a fit; None where the precision needs none."""
    if precision not in RESIDUAL_BITS:
        ranges = Int8Ranges.read(folder / RANGES_FILE) if precision == "int8" else None
        return NumberCodec(precision, ranges)
    buckets, cutoffs = np.load(folder / BUCKETS_FILE), (1 << RESIDUAL_BITS[precision]) - 1
    return ResidualCodec(read_centroids(folder), buckets[:cutoffs], buckets[cutoffs:], device)


def read_centroids(folder: Path) -> np.ndarray:
    return np.array(open_array(folder / CENTROIDS_FILE))


def read_loss(folder: Path | None) -> dict[str, float]:
    """{} where nothing was measured."""
    return {} if folder is None else read_json(folder / LOSS_FILE)


def loss_of(codec: Codec, sample: TokenVectors, device: "str | torch.device") -> dict[str, float]:
    """What the vectors that are kept find among the sample, with its first documents as queries, of which the first
    `MEASURED_TOKENS` tokens are searched: `recall`, the part of the best `MEASURED_DEPTH`, and `ndcg`, the nDCG at this
    depth where the best document has the grade `MEASURED_DEPTH`, the second one less, and so on. A document does not
    find itself.
    """
    texts = sample.texts()
    queries = TokenVectors.of([text[:MEASURED_TOKENS] for text in texts[:MEASURED_QUERIES]])
    scores = [[], []]
    for block in sample.groups(BLOCK):
        kept = TokenVectors(codec.decode(codec.encode(block.vectors)), block.counts)
        for place, documents in enumerate((block, kept)):
            groups = [maxsim(group, documents, device) for group in queries.groups(ASKED)]
            scores[place].append(np.concatenate(groups))
    exact, approximate = (np.concatenate(blocks, axis=1) for blocks in scores)
    own = np.arange(len(exact))
    exact[own, own] = approximate[own, own] = -np.inf
    depth = min(MEASURED_DEPTH, len(texts) - 1)
    best, found = (np.argsort(-each, axis=1, kind="stable")[:, :depth] for each in (exact, approximate))
    return {"recall": part_found(own, best, found), "ndcg": _ndcg(best, found)}


def _ndcg(best: np.ndarray, found: np.ndarray) -> float:
    """best, found: documents of each query in their order: int64 [queries, depth]."""
    values, grades = [], np.arange(best.shape[1], 0, -1, dtype=np.float32)
    for of_query, rows in zip(best, found, strict=True):
        grade_of = dict(zip(of_query.tolist(), grades.tolist(), strict=True))
        ranked = np.array([grade_of.get(row, 0) for row in rows.tolist()], np.float32)
        values.append(metric_value(f"ndcg@{MEASURED_DEPTH}", Ranking(ranked, grades, 1.0, float(len(grades)))))
    return float(np.mean(values)) if best.shape[1] else 1.0
