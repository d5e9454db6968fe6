"""How far an exported model is from the model it was made from, and how far it may be.

int8 is judged by the order of documents, not by the size of differences: its scores are off by a tenth or more and
still rank alike. float32 has to give the model's scores, or its vectors.
"""

import logging
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from pathlib import Path
from typing import NamedTuple

import numpy as np
from scipy.stats import ConstantInputWarning, spearmanr

from rag_retrieval.core.command import CommandFailure
from rag_retrieval.data.beir import Run, find_optional
from rag_retrieval.evaluate.pairs import read_pairs
from rag_retrieval.evaluate.ranking_data import RankingData, read_ranking_data
from rag_retrieval.export.calibrate import evenly
from rag_retrieval.export.config import ExportConfig
from rag_retrieval.export.source import Compute, Results, Source
from rag_retrieval.metrics import run_metrics
from rag_retrieval.models.pair_encoding import EncodedPair
from rag_retrieval.retrieval.bm25 import BM25

logger = logging.getLogger(__name__)

FLOAT32_LIMIT = 1e-4  # largest difference of a score or of a number of a vector, relative where they exceed 1
LEAST_CORRELATION = 0.98  # of int8: Spearman's, over all pairs
LARGEST_LOSS = 0.01  # of int8: nDCG@10, and Spearman's correlation with labels
MEASURE = "ndcg@10"
COMPUTED_PAIRS = 128  # of the data, or documents of a corpus, at once
RANKED = 100  # documents of a query that are searched for in a corpus
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
    nDCG@10 of model and export, None without data. graded_before, graded_after: Spearman's correlation of scores with
    the labels of graded pairs, None without them."""

    max_difference: float
    rank_correlation: float
    ndcg_before: float | None = None
    ndcg_after: float | None = None
    graded_before: float | None = None
    graded_after: float | None = None

    def describe(self) -> str:
        text = f"largest difference {self.max_difference:.1e}, rank correlation {self.rank_correlation:.4f}"
        for name, before, after in self.measures():
            text += f", {name} {before:.4f} before, {after:.4f} after ({after - before:+.4f})"
        return text

    def measures(self) -> Iterator[tuple[str, float, float]]:
        """(name, of the model, of the export)"""
        if self.ndcg_before is not None:
            yield "nDCG@10", self.ndcg_before, self.ndcg_after
        if self.graded_before is not None:
            yield "Spearman's correlation with the labels", self.graded_before, self.graded_after

    def problems(self) -> Iterator[str]:
        """What is beyond the limits of int8."""
        if not self.rank_correlation >= LEAST_CORRELATION:
            yield f"rank correlation {self.rank_correlation:.4f} is below {LEAST_CORRELATION}"
        for name, before, after in self.measures():
            if not before - after <= LARGEST_LOSS:
                yield f"{name} falls by {before - after:.4f}, more than {LARGEST_LOSS}"


@dataclass(frozen=True)
class Verification:
    """pairs: number compared. shortest, longest: tokens. changes: of the "scores" of a reranker, of an embedder by
    representation. data, queries: what nDCG@10 is of, None without data. searched: what is ranked for each query, in
    words. graded: the file of graded pairs, None without them."""

    pairs: int
    shortest: int
    longest: int
    changes: dict[str, Change]
    data: str | None = None
    queries: int | None = None
    searched: str | None = None
    graded: str | None = None

    def describe(self) -> str:
        on_data = "" if self.data is None else f", nDCG@10 on {self.data} ({self.queries} queries, {self.searched})"
        on_data += "" if self.graded is None else f", labels of {self.graded}"
        lines = [f"{self.pairs:,} pairs of {self.shortest} to {self.longest} tokens{on_data}"]
        return "\n  ".join([*lines, *(f"{kind}: {change.describe()}" for kind, change in self.changes.items())])

    def problems(self) -> list[str]:
        """What is beyond the limits of int8, in words."""
        return [f"{problem} ({kind})" for kind, change in self.changes.items() for problem in change.problems()]


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
    problems = verification.problems()
    if problems and not force:
        raise DifferenceError(
            f"int8 changes this model too much: {' and '.join(problems)}; nothing was written. Leave --quantize out, "
            "leave the costliest layers in float32 with --exclude_layers auto, or keep it all the same with --force"
        )
    return problems


def rank_correlation(first: np.ndarray, second: np.ndarray) -> float:
    """Spearman's coefficient in [-1, 1]; nan where all values of one are equal."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConstantInputWarning)
        return float(spearmanr(first, second).statistic)


class Computed(NamedTuple):
    """What a model or its export gives, by the kind of result. sample: of the texts of the sample's pairs. scores: of
    the sample's pairs, then of the data's, float32 [pairs]. graded: the same of the graded pairs."""

    sample: Results
    scores: dict[str, np.ndarray]
    graded: dict[str, np.ndarray]


class GradedPairs(NamedTuple):
    """texts: of all pairs, encoded. labels: float64 [pairs]."""

    name: str
    texts: list[EncodedPair]
    labels: np.ndarray


@dataclass(frozen=True)
class CheckData:
    """encoded: the texts of the sample's pairs, then of all candidates of the data in their order. samples: pairs of
    the sample. data: None where none were given."""

    source: Source
    encoded: list[EncodedPair]
    samples: int
    data: RankingData | None
    graded: GradedPairs | None

    @property
    def sample_texts(self) -> int:
        return self.samples * self.source.texts_of_a_pair

    @property
    def texts(self) -> list[EncodedPair]:
        """All that are computed."""
        return self.encoded + (self.graded.texts if self.graded is not None else [])

    @property
    def searched(self) -> str:
        return f"{self.data.source}'s candidates"

    def computed(self, compute: Compute, sample_alone: bool = False) -> Computed:
        sample = compute(self.encoded[: self.sample_texts])
        scores, graded = self.source.scores(sample), {}
        if not sample_alone:
            on_data = self.data_scores(compute)
            scores = {kind: np.concatenate([own, *on_data.get(kind, [])]) for kind, own in scores.items()}
            if self.graded is not None:
                graded = {kind: np.concatenate(of) for kind, of in self.pair_scores(self.graded.texts, compute).items()}
        return Computed(sample, scores, graded)

    def pair_scores(self, texts: Sequence[EncodedPair], compute: Compute) -> dict[str, list[np.ndarray]]:
        """Parts of some pairs each. Token vectors of all texts would fill the memory: of those the scores are kept."""
        parts: dict[str, list[np.ndarray]] = {}
        size = COMPUTED_PAIRS * self.source.texts_of_a_pair
        for start in range(0, len(texts), size):
            for kind, scores in self.source.scores(compute(texts[start : start + size])).items():
                parts.setdefault(kind, []).append(scores)
        return parts

    def data_scores(self, compute: Compute) -> dict[str, list[np.ndarray]]:
        """Of the data's pairs, in parts."""
        return self.pair_scores(self.encoded[self.sample_texts :], compute)

    def candidate_places(self) -> np.ndarray:
        """Where the scores of the data's candidates are among all; without data those of the sample's pairs."""
        pairs = len(self.encoded) // self.source.texts_of_a_pair
        return np.arange(self.samples if self.data is not None else 0, pairs)

    def compare(self, expected: Computed, exported: Computed) -> Verification:
        """The rank correlation is over the data's candidates alone, where there are any."""
        lengths, places, changes = [len(text) for text in self.texts], self.candidate_places(), {}
        for kind in expected.scores:
            largest = largest_difference(expected, exported, kind)
            sides, ndcg, graded = (expected, exported), (None, None), (None, None)
            correlation = rank_correlation(*(side.scores[kind][places] for side in sides))
            if self.data is not None:
                runs = [self.run_of(side.scores[kind][self.samples :]) for side in sides]
                ndcg = [run_metrics(self.data.qrels, run, (MEASURE,))[MEASURE] for run in runs]
            if self.graded is not None:
                graded = [rank_correlation(side.graded[kind], self.graded.labels) for side in sides]
            changes[kind] = Change(largest, correlation, *ndcg, *graded)
        on_data = (None,) * 3 if self.data is None else (self.data.name, len(self.data.qrels), self.searched)
        graded_name = None if self.graded is None else self.graded.name
        return Verification(len(places), min(lengths), max(lengths), changes, *on_data, graded_name)

    def run_of(self, scores: np.ndarray) -> Run:
        """scores: of the data's pairs, in order."""
        values = iter(scores.tolist())
        return {
            query: {document: next(values) for document in documents}
            for query, documents in self.data.candidates.items()
        }


@dataclass(frozen=True)
class CorpusData(CheckData):
    """The whole corpus, or a part of it, searched by an embedder: the data's pairs are each query with each document.
    encoded: of the sample alone. queries, documents: by id. corpus: documents there are."""

    queries: dict[str, EncodedPair]
    documents: dict[str, EncodedPair]
    corpus: int

    @property
    def texts(self) -> list[EncodedPair]:
        return [*super().texts, *self.queries.values(), *self.documents.values()]

    @property
    def searched(self) -> str:
        found = len(self.documents)
        return f"all {found:,} documents" if found == self.corpus else f"{found:,} of {self.corpus:,} documents"

    def data_scores(self, compute: Compute) -> dict[str, list[np.ndarray]]:
        queries, documents = compute(list(self.queries.values())), list(self.documents.values())
        blocks: dict[str, list[np.ndarray]] = {}
        for start in range(0, len(documents), COMPUTED_PAIRS):
            found = compute(documents[start : start + COMPUTED_PAIRS])
            for kind, scores in self.source.search_scores(queries, found).items():
                blocks.setdefault(kind, []).append(scores)
        return {kind: [np.concatenate(of, axis=1).ravel()] for kind, of in blocks.items()}

    def candidate_places(self) -> np.ndarray:
        columns = {document: place for place, document in enumerate(self.documents)}
        found = [
            self.samples + row * len(columns) + columns[document]
            for row, query in enumerate(self.queries)
            for document in self.data.candidates[query]
        ]
        return np.array(found, np.int64)

    def run_of(self, scores: np.ndarray) -> Run:
        """The best of each query. A document with the query's own id is none of them, as among candidates."""
        ids, run = list(self.documents), {}
        for query, own in zip(self.queries, scores.reshape(len(self.queries), -1), strict=True):
            best = np.argsort(-own, kind="stable")[: RANKED + 1]
            run[query] = {ids[place]: float(own[place]) for place in best.tolist() if ids[place] != query}
        return run


def read_check_data(config: ExportConfig, source: Source) -> CheckData:
    """Raises ValueError for data that cannot be read."""
    samples, graded = sample_pairs(source), read_graded(config, source)
    if config.data is None:
        return CheckData(source, source.encode(samples), len(samples), None, graded)
    whole = read_ranking_data(config.data, config.split, BM25, config.depth)
    data = first_queries(whole, config.queries)
    path = Path(config.data)
    has_corpus = path.is_dir() and find_optional(path, f"candidates.{config.split}.tsv") is None
    searches = has_corpus and source.texts_of_a_pair == 2
    if not searches and "documents" in config.model_fields_set:
        logger.warning("documents: only for an embedder and a folder without a pool of candidates; ignored")
    if searches:
        queries = {query: data.queries[query] for query in data.qrels}
        documents = some_documents(data, config.documents)
        encoded = (dict(zip(of, source.encode_kind(list(of.values()), kind), strict=True))
                   for of, kind in ((queries, "query"), (documents, "document")))  # fmt: skip
        return CorpusData(source, source.encode(samples), len(samples), data, graded, *encoded, len(data.documents))
    pairs = [
        (data.queries[query], data.documents[document])
        for query, documents in data.candidates.items()
        for document in documents
    ]
    return CheckData(source, source.encode([*samples, *pairs]), len(samples), data, graded)


def read_graded(config: ExportConfig, source: Source) -> GradedPairs | None:
    if config.graded_pairs is None:
        return None
    first, second, labels = read_pairs(Path(config.graded_pairs))
    texts = source.encode(list(zip(first, second, strict=True)), alike=True)
    return GradedPairs(Path(config.graded_pairs).name, texts, labels)


def some_documents(data: RankingData, count: int) -> dict[str, str]:
    """Texts by id: all that are relevant or candidates for a query, and others evenly from the corpus up to `count`."""
    kept = {document for grades in data.qrels.values() for document, grade in grades.items() if grade > 0}
    kept |= {document for candidates in data.candidates.values() for document in candidates}
    others = [document for document in data.documents if document not in kept]
    room = max(0, count - len(kept & data.documents.keys()))
    places = np.linspace(0, len(others), min(room, len(others)), endpoint=False).astype(int)
    kept |= {others[place] for place in places.tolist()}
    return {document: text for document, text in data.documents.items() if document in kept}


def first_queries(data: RankingData, count: int) -> RankingData:
    """At most `count` judged queries, evenly from all."""
    kept = evenly(list(data.qrels), count)
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
