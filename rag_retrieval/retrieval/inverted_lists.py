"""Inverted lists in shards: the documents of each term beside each other, made within the memory of one shard, mapped
when they are searched.

    NAME_counts.npy     int32 [documents], entries of each document of the shard
    NAME_terms.npy      int32, the terms that occur in the shard, rising
    NAME_starts.npy     int64 [terms + 1], where the documents of each term begin
    NAME_documents.npy  int32 [entries], rows within the shard, rising within a term
    NAME_weights.npy    float32 [entries], where terms have weights
"""

from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np

from rag_retrieval.retrieval.stored_vectors import open_array

ARRAYS = ("counts", "terms", "starts", "documents")


class Weights(NamedTuple):
    """Weights of terms, text after text; within a text each term once. ids: int64 [entries]. weights: float32
    [entries]. counts: int64 [texts], the entries of each."""

    ids: np.ndarray
    weights: np.ndarray
    counts: np.ndarray

    def texts(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """(ids, weights) of each text."""
        ends = np.cumsum(self.counts)
        for start, end in zip(ends - self.counts, ends, strict=True):
            yield self.ids[start:end], self.weights[start:end]


class InvertedLists:
    """Of one shard, without its weights where it has none."""

    def __init__(self, shard: Path, name: str, has_weights: bool):
        self.counts, self.terms, self.starts, self.documents = (
            open_array(shard / f"{name}_{array}.npy") for array in ARRAYS
        )
        self.weights = open_array(shard / f"{name}_weights.npy") if has_weights else None

    def find(self, terms: np.ndarray) -> Iterator[tuple[int, slice]]:
        """The place among `terms` of each that occurs in the shard, and where its documents and weights are."""
        if len(self.terms):
            places = np.minimum(np.searchsorted(self.terms, terms), len(self.terms) - 1)
            for place in np.flatnonzero(self.terms[places] == terms).tolist():
                yield place, slice(*self.starts[places[place] : places[place] + 2].tolist())

    def by_document(self) -> Weights:
        """All of the shard, document after document, terms rising."""
        order = np.argsort(self.documents, kind="stable")
        terms = np.repeat(self.terms, np.diff(self.starts)).astype(np.int64)
        return Weights(terms[order], self.weights[order], self.counts.astype(np.int64))


def write_lists(shard: Path, name: str, ids: np.ndarray, counts: np.ndarray, weights: np.ndarray | None) -> None:
    """Of the documents of a shard, in their order; arrays as those of `Weights`."""
    order = np.argsort(ids, kind="stable")
    terms, starts = np.unique(ids[order], return_index=True)
    documents = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
    arrays = (counts.astype(np.int32), terms.astype(np.int32), np.append(starts, len(ids)), documents[order])
    named = dict(zip(ARRAYS, arrays, strict=True)) | ({} if weights is None else {"weights": weights[order]})
    for array, values in named.items():
        with (shard / f"{name}_{array}.npy").open("wb") as file:
            np.lib.format.write_array(file, values)
