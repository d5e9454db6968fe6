"""Ranges of what goes into a graph's products, over a user's texts: what static int8 covers with its 256 steps.

ONNX Runtime has calibrators of the same methods. These here count into a histogram of fixed size, so that memory does
not grow with the texts, and see no padding: theirs keep all activations of a call, add bins without a bound where a
value is far beyond those of the first text, and leave out what is nearer to 0 than anything in it.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import onnx
from onnx import TensorProto, helper

from rag_retrieval.core.log import Progress
from rag_retrieval.data.beir import read_folder
from rag_retrieval.data.readers import read_records, text_lines
from rag_retrieval.data.records import RecordRules
from rag_retrieval.export.config import ExportConfig
from rag_retrieval.export.source import Source
from rag_retrieval.infer.onnx_backend import default_threads, open_session
from rag_retrieval.infer.onnx_folder import padded_inputs
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.models.token_batch import make_batch
from rag_retrieval.retrieval.bm25 import bm25_run

BINS = 4096  # of a histogram, a multiple of 4
KEPT_LEVELS = 128  # that the entropy method rounds the sizes of values to, as TensorRT does
CANDIDATE_STEP = 16  # bins between two thresholds that it tries
TINY = 1e-9  # share that stands for none in a logarithm


class Range(NamedTuple):
    """low <= 0 <= high: products have zeros, which stay zeros."""

    low: float
    high: float


class Histogram:
    """How often values of one activation were where: `BINS` equal bins from -limit to limit. Where a value is beyond
    them, the limit doubles, and each two bins become one: every value is counted, in one bin."""

    def __init__(self):
        self.counts = np.zeros(BINS, np.int64)
        self.limit = 2.0**-20
        self.low = self.high = 0.0

    def add(self, values: np.ndarray) -> None:
        """values: float32, of any shape, finite."""
        values = values.ravel()
        self.low, self.high = min(self.low, float(values.min())), max(self.high, float(values.max()))
        while self.limit < max(-self.low, self.high):
            self.limit *= 2
            pairs = self.counts.reshape(-1, 2).sum(axis=1)
            self.counts = np.pad(pairs, BINS // 4)
        places = (values * (BINS / 2 / self.limit) + BINS / 2).astype(np.int64)
        self.counts += np.bincount(np.minimum(places, BINS - 1), minlength=BINS)

    def range(self, method: str, percentile: float) -> Range:
        """method: of `CALIBRATION_METHODS`. max: of all values. percentile: without the largest and the smallest
        (100 - percentile) / 2 percent of them, to the width of a bin. entropy: see `entropy_threshold`."""
        low, high = -self.limit, self.limit
        edges = np.linspace(low, high, BINS + 1)
        if method == "percentile":
            below, cut = self.counts.cumsum(), (100 - percentile) / 200 * self.counts.sum()
            low = edges[np.searchsorted(below, cut, side="right")]
            high = edges[np.searchsorted(below, self.counts.sum() - cut) + 1]
        elif method == "entropy":
            sizes = self.counts[BINS // 2 :] + self.counts[: BINS // 2][::-1]
            high = edges[BINS // 2 + entropy_threshold(sizes)]
            low = -high
        return Range(min(0.0, max(low, self.low)), max(0.0, min(high, self.high)))


def entropy_threshold(sizes: np.ndarray) -> int:
    """The number of bins to keep: with which rounding to `KEPT_LEVELS` levels changes the distribution least.

    sizes: counts of |values|, from 0 on. For each threshold, what is beyond it joins the last bin of p; q has the mean
    of each level's bins in those that are not empty; the smallest KL(p || q) wins. The method of TensorRT: Migacz,
    8-bit inference with TensorRT, GTC 2017.
    """
    divergences = {}
    for kept in range(KEPT_LEVELS, len(sizes) + 1, CANDIDATE_STEP):
        inside = sizes[:kept].astype(np.float64)
        p = inside.copy()
        p[-1] += sizes[kept:].sum()
        starts = np.linspace(0, kept, KEPT_LEVELS, endpoint=False).astype(int)
        filled = (p > 0).astype(np.float64)
        means = np.add.reduceat(inside, starts) / np.maximum(np.add.reduceat(filled, starts), 1)
        q = np.repeat(means, np.diff([*starts, kept])) * filled
        p, q = p / p.sum(), q / max(q.sum(), 1)
        divergences[kept] = float(np.sum(p[p > 0] * np.log(p[p > 0] / np.maximum(q[p > 0], TINY))))
    return min(divergences, key=divergences.get)


def calibration_texts(config: ExportConfig, source: Source) -> list[EncodedPair]:
    """Encoded as the model gets them, prompts included: at most `calibration_texts` lines of a .txt file, or texts of
    so many pairs of a query and a document, evenly from all.

    Of a folder in BEIR layout any query with BM25's best document; of ranking records a query with its first one.
    Raises ValueError for a file that cannot be read and for a .txt file where pairs are needed.
    """
    path, most = Path(config.calibrate_with), config.calibration_texts
    if path.suffix == ".txt":
        if source.texts_of_a_pair == 1:
            raise ValueError(
                f"calibrate_with: {path} has single texts, and a reranker reads pairs; give a folder in BEIR layout or "
                "a file of ranking records"
            )
        lines = evenly([text for _, text in text_lines(path)], most)
        if not lines:
            raise ValueError(f"calibrate_with: {path} has no text; expected one in each line")
        return source.encode_kind(lines, "document")
    if path.is_dir():
        folder = read_folder(path)
        queries = dict(evenly(list(folder.queries.items()), most))
        run, _ = bm25_run(folder.documents, queries, None, 1)
        pairs = [(queries[query], folder.documents[best]) for query, found in run.items() for best in found]
        if not pairs:
            raise ValueError(f"calibrate_with: {path}: BM25 finds no document for any query; give ranking records")
        return source.encode(pairs)
    records = list(read_records(path, RecordRules()))
    return source.encode([(record.query, record.documents[0]) for record in evenly(records, most)])


def evenly(values: Sequence, most: int) -> Sequence:
    """Every n-th, with the least n for which they are at most `most`."""
    return values[:: max(1, -(-len(values) // most))]


def activation_ranges(
    file: Path,
    activations: Sequence[str],
    texts: Sequence[EncodedPair],
    inputs: Sequence[str],
    method: str,
    percentile: float,
) -> Mapping[str, Range]:
    """Run the float32 graph of `file` on the texts, one at a time, and return the range of each activation.

    inputs: names of the graph's. method, percentile: see `Histogram.range`. Memory: the activations of one text. A
    graph of the size of `file` stands beside it meanwhile. Raises ValueError for an activation that is not finite.
    """
    model = onnx.load(file, load_external_data=False)
    del model.graph.output[:]
    model.graph.output.extend(helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in activations)
    observed = file.with_name(f"observed.{file.name}")
    onnx.save(model, observed)
    try:
        session = open_session(observed, "cpu", default_threads(None))
    finally:
        observed.unlink()
    histograms = {name: Histogram() for name in activations}
    with Progress(len(texts), "calibrating", "texts") as progress:
        for text in texts:
            found = session.run(list(activations), padded_inputs(make_batch([text]), inputs, 0))
            for name, values in zip(activations, found, strict=True):
                if not np.isfinite(values).all():
                    raise ValueError(f"calibrate_with: the model computes numbers that are not finite at {name}")
                histograms[name].add(values)
            progress.update(1)
    return {name: each.range(method, percentile) for name, each in histograms.items()}
