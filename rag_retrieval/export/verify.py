"""How far an exported model is from the model it was made from, and how far it may be.

int8 is judged by the order of documents, not by the size of differences: its scores are off by a tenth or more and
still rank alike. float32 has to give the model's scores, or its vectors.
"""

import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from typing import NamedTuple

import numpy as np
from scipy.stats import ConstantInputWarning, spearmanr

from rag_retrieval.core.command import CommandFailure
from rag_retrieval.data.beir import Run
from rag_retrieval.evaluate.ranking_data import RankingData, read_ranking_data
from rag_retrieval.export.config import ExportConfig
from rag_retrieval.export.source import Compute, Results, Source
from rag_retrieval.metrics import run_metrics
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.retrieval.bm25 import BM25

FLOAT32_LIMIT = 1e-4  # largest difference of a score or of a number of a vector, relative where they exceed 1
LEAST_CORRELATION = 0.98  # of int8: Spearman's, over all pairs
LARGEST_LOSS = 0.01  # of int8: nDCG@10
MEASURE = "ndcg@10"
COMPUTED_PAIRS = 128  # of the data, at once
QUERIES = (
    "How do I read a file line by line in Python?",
    "What are the first signs of the flu?",
    "When does a file handle get closed?",
    "which river runs through Paris",
    "如何逐行读取一个文件？",
    "感冒有哪些早期症状？",
    "怎样解除实例与安全组的绑定？",
    "水在高山上多少度沸腾",
)
SENTENCES = (
    "Iterating over an open file gives its lines one after another, each with its line break. ",
    "Fever, cough, a sore throat and tiredness begin within two days and last for about a week. ",
    "打开文件以后用循环读取，每次得到一行，末尾带有换行符。",
    "The file is closed when the block ends, even if an error was raised inside it. ",
    "发烧、咳嗽、咽痛和乏力通常在一两天内出现，大约一周后好转。",
    "At 3,000 m water boils at 90 °C; the Seine has nothing to do with it. ",
    "先调用查询接口确认状态为成功，再提交解绑请求，一次只能解绑一个安全组。",
    "See also: `open(path, encoding='utf-8')`, io.TextIOWrapper and os.fsync(). ",
)
STEPS = (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 144, 233, 377, 610, 987)  # tokens of a document; then up to the limit


class DifferenceError(CommandFailure):
    """The exported model does not compute what the model computes that it was made from."""


@dataclass(frozen=True)
class Change:
    """What the export changes. max_difference: of the scores of pairs, and of the sample's results (`Computed`).
    rank_correlation: Spearman's, of the scores of all pairs; an embedder's are similarities. ndcg_before, ndcg_after:
    nDCG@10 of model and export, None without data."""

    max_difference: float
    rank_correlation: float
    ndcg_before: float | None = None
    ndcg_after: float | None = None

    def describe(self) -> str:
        text = f"largest difference {self.max_difference:.1e}, rank correlation {self.rank_correlation:.4f}"
        if self.ndcg_before is not None:
            change = self.ndcg_after - self.ndcg_before
            text += f", nDCG@10 {self.ndcg_before:.4f} before, {self.ndcg_after:.4f} after ({change:+.4f})"
        return text

    def problems(self) -> Iterator[str]:
        """What is beyond the limits of int8."""
        if not self.rank_correlation >= LEAST_CORRELATION:
            yield f"rank correlation {self.rank_correlation:.4f} is below {LEAST_CORRELATION}"
        if self.ndcg_before is not None and not self.ndcg_before - self.ndcg_after <= LARGEST_LOSS:
            yield f"nDCG@10 falls by {self.ndcg_before - self.ndcg_after:.4f}, more than {LARGEST_LOSS}"


@dataclass(frozen=True)
class Verification:
    """pairs: number compared. shortest, longest: tokens. changes: of the "scores" of a reranker, of an embedder by
    representation. data, queries: what nDCG@10 is of, None without data."""

    pairs: int
    shortest: int
    longest: int
    changes: dict[str, Change]
    data: str | None = None
    queries: int | None = None

    def describe(self) -> str:
        on_data = "" if self.data is None else f", nDCG@10 on {self.data} ({self.queries} queries)"
        lines = [f"{self.pairs:,} pairs of {self.shortest} to {self.longest} tokens{on_data}"]
        return "\n  ".join([*lines, *(f"{kind}: {change.describe()}" for kind, change in self.changes.items())])


def check_float32(expected: "Computed", exported: "Computed") -> None:
    """Raises DifferenceError beyond FLOAT32_LIMIT, and for a number that is not finite. exported: perhaps of the sample
    alone."""
    for kind, results in exported.sample.items():
        check_numbers(kind, *aligned(expected.sample[kind], results))
        check_numbers(kind, expected.scores[kind][: len(exported.scores[kind])], exported.scores[kind])


def check_numbers(kind: str, expected: np.ndarray, exported: np.ndarray) -> None:
    allowed = FLOAT32_LIMIT * np.maximum(1.0, np.abs(expected))
    wrong = np.flatnonzero(~(np.abs(expected - exported) <= allowed))
    if wrong.size:
        place = wrong[np.argmax(np.abs(expected - exported)[wrong])]
        raise DifferenceError(
            f"the ONNX graph does not compute what the model computes: {kind}: {wrong.size} of {expected.size} numbers "
            f"differ by more than {FLOAT32_LIMIT}, such as {exported[place]:.6f} where the model gives "
            f"{expected[place]:.6f}; nothing was written. Exporting this family does not work with the installed torch"
        )


def aligned(expected: Sequence, exported: Sequence) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of texts' results beside each other, float32: scores, vectors, or weights of tokens, which are 0
    where a text has no such token."""
    sides: tuple[list, list] = ([], [])
    for pair in zip(expected, exported, strict=True):
        if isinstance(pair[0], tuple):
            ids = np.union1d(pair[0][0], pair[1][0])
            for side, (own, weights) in zip(sides, pair, strict=True):
                side.append(np.zeros(len(ids), np.float32))
                side[-1][np.searchsorted(ids, own)] = weights
        else:
            for side, values in zip(sides, pair, strict=True):
                side.append(np.ravel(values))
    return np.concatenate(sides[0]), np.concatenate(sides[1])


def largest_difference(expected: "Computed", exported: "Computed", kind: str) -> float:
    sides = aligned(expected.sample[kind], exported.sample[kind]), (expected.scores[kind], exported.scores[kind])
    return max(float(np.abs(one - other).max(initial=0)) for one, other in sides)


def check_int8(verification: Verification, force: bool) -> list[str]:
    """What is beyond the limits of int8, in words. Raises DifferenceError where there is something, without `force`."""
    changes = verification.changes.items()
    problems = [f"{problem} ({kind})" for kind, change in changes for problem in change.problems()]
    if problems and not force:
        raise DifferenceError(
            f"int8 changes this model too much: {' and '.join(problems)}; nothing was written. Leave --quantize out, "
            "or keep it all the same with --force"
        )
    return problems


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's coefficient in [-1, 1]; nan where all values of one are equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(spearmanr(first, second).statistic)


class Computed(NamedTuple):
    """What a model or its export gives, by the kind of result. sample: of the texts of the sample's pairs. scores: of
    the sample's pairs, then of the data's, float32 [pairs]."""

    sample: Results
    scores: dict[str, np.ndarray]


@dataclass(frozen=True)
class CheckData:
    """encoded: the texts of the sample's pairs, then of all candidates of the data in their order. samples: pairs of
    the sample. data: None where none were given."""

    source: Source
    encoded: list[EncodedPair]
    samples: int
    data: RankingData | None

    @property
    def sample_texts(self) -> int:
        return self.samples * self.source.texts_of_a_pair

    def computed(self, compute: Compute, sample_alone: bool = False) -> Computed:
        """Token vectors of the data's texts would fill the memory: of those the scores are kept."""
        sample = compute(self.encoded[: self.sample_texts])
        parts, size = [self.source.scores(sample)], COMPUTED_PAIRS * self.source.texts_of_a_pair
        for start in range(self.sample_texts, self.sample_texts if sample_alone else len(self.encoded), size):
            parts.append(self.source.scores(compute(self.encoded[start : start + size])))
        return Computed(sample, {kind: np.concatenate([part[kind] for part in parts]) for kind in sample})

    def compare(self, expected: Computed, exported: Computed) -> Verification:
        """The rank correlation is over the data's pairs alone, where there are any."""
        lengths, changes = [len(text) for text in self.encoded], {}
        for kind in expected.scores:
            largest = largest_difference(expected, exported, kind)
            scores, ndcg = [expected.scores[kind], exported.scores[kind]], ()
            if self.data is not None:
                scores = [each[self.samples :] for each in scores]
                ndcg = (run_metrics(self.data.qrels, self.run_of(each), (MEASURE,))[MEASURE] for each in scores)
            changes[kind] = Change(largest, rank_correlation(*scores), *ndcg)
        on_data = () if self.data is None else (self.data.name, len(self.data.qrels))
        pairs = len(self.encoded) // self.source.texts_of_a_pair
        return Verification(pairs, min(lengths), max(lengths), changes, *on_data)

    def run_of(self, scores: np.ndarray) -> Run:
        """scores: of the data's pairs, in order."""
        values = iter(scores.tolist())
        return {
            query: {document: next(values) for document in documents}
            for query, documents in self.data.candidates.items()
        }


def read_check_data(config: ExportConfig, source: Source) -> CheckData:
    """Raises ValueError for data that cannot be read."""
    samples = sample_pairs(source)
    if config.data is None:
        return CheckData(source, source.encode(samples), len(samples), None)
    data = first_queries(read_ranking_data(config.data, config.split, BM25, config.depth), config.queries)
    pairs = [
        (data.queries[query], data.documents[document])
        for query, documents in data.candidates.items()
        for document in documents
    ]
    return CheckData(source, source.encode([*samples, *pairs]), len(samples), data)


def first_queries(data: RankingData, count: int) -> RankingData:
    """At most `count` judged queries, evenly from all."""
    names = list(data.qrels)
    kept = names[:: -(-len(names) // count)]
    qrels, candidates = ({query: values[query] for query in kept} for values in (data.qrels, data.candidates))
    return replace(data, qrels=qrels, candidates=candidates)


def sample_pairs(source: Source) -> list[tuple[str, str]]:
    """(query, document) pairs of our own: documents of one token, of lengths between, and of more than the model reads;
    and one query of more than that.

    A graph that was traced at one length, or that pads wrongly, is right for pairs like the traced ones and for no
    others. For every length there are two pairs, with other queries and other sentences in front.
    """
    budget = source.budget
    lengths = [tokens for tokens in STEPS if tokens < budget] + [budget, 2 * budget]
    queries = cycle(QUERIES)
    pairs = [("a", "b"), ("", SENTENCES[0])]
    for place, tokens in enumerate(lengths):
        for start in (place, place + len(SENTENCES) // 2):
            pairs.append((next(queries), document_of(source, tokens, start)))
    pairs.append((document_of(source, 2 * budget, 1), SENTENCES[0]))
    return pairs


def document_of(source: Source, tokens: int, start: int) -> str:
    """Sentences in turn from number `start`, cut to about `tokens` tokens."""
    text = ""
    for sentence in islice(cycle(SENTENCES), start, start + tokens + len(SENTENCES)):
        text += sentence
        count = source.count(text)
        if count >= tokens:
            break
    return text[: max(1, round(len(text) * tokens / count))]
