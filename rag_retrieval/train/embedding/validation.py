"""Validation of an embedder: what it finds in a corpus, or how its similarities follow graded labels, and the loss.

Every evaluation after the first step stands beside the one before it: how far the figure is from where training began,
and whether other queries would show the same.
"""

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn

from rag_retrieval.core.distributed import on_main
from rag_retrieval.core.files import read_json, write_json
from rag_retrieval.data.collection import Collection
from rag_retrieval.losses.embedding import ENSEMBLE, Objective
from rag_retrieval.metrics import AT_START, P_VALUE, PerQuery, Run, means, parse_metric, query_metrics
from rag_retrieval.models.representations import DENSE
from rag_retrieval.models.vectors import finish
from rag_retrieval.significance import Comparison, compare
from rag_retrieval.train.embedding.rankings import ranked, rankings
from rag_retrieval.train.embedding.shared_encoding import SharedEncoding, first_texts
from rag_retrieval.train.embedding.text_outputs import Outputs, difference, joined
from rag_retrieval.train.failures import translate_storage_errors

logger = logging.getLogger(__name__)

METRICS = ("ndcg@10", "mrr@10", "recall@10", "recall@100")
DEPTH = 1000  # documents ranked for a metric without a cutoff, as in trec_eval
ONE_DIRECTION = 0.99  # mean cosine
SIGNIFICANT = 0.05
UNCHANGED = 1e-6  # of a number of a vector of length 1, which float32 computes to some 1e-7
PROBES = 64  # queries, and documents, whose vectors are kept for comparison

Measure = Callable[[Outputs, Outputs], float]  # of queries and documents


class EmbeddingValidation:
    """Measures a model on a collection. Every process makes it from the same arguments and calls it with the others.

    encoding: of the collection's queries and documents. objective: how texts are compared. names: of ranking metrics;
    none where ranks say nothing, as on graded pairs. They are of the model's one representation, or of the ensemble of
    several, each of which has them too, as lexical/NAME. measures: further values by name, such as the loss. start: the
    file that keeps the evaluation before the first step, for a resumed run; None where there is no such evaluation. The
    first of names and measures is compared with it. widths: of Matryoshka, at which the first of names is measured for
    dense vectors too, as NAME/WIDTH.
    metrics: the names of what can be measured.
    """

    def __init__(
        self,
        collection: Collection,
        encoding: SharedEncoding,
        *,
        objective: Objective,
        names: Sequence[str] = METRICS,
        measures: Mapping[str, Measure] | None = None,
        device: torch.device | str = "cpu",
        start: Path | None = None,
        widths: Sequence[int] = (),
    ):
        self.collection, self.encoding, self.objective, self.device = collection, encoding, objective, device
        self.without_relevant = collection.without_relevant
        self.names = names if len(self.without_relevant) < len(collection.queries) else ()
        self.depth = max([parse_metric(name)[1] or DEPTH for name in self.names], default=0)
        self.measures, self.start, self.widths = measures or {}, start, widths
        parts = [name for name in objective.loss_weights if name != ENSEMBLE]
        of_parts = [f"{part}/{name}" for part in parts for name in self.names] if len(parts) > 1 else []
        self.metrics = [*self.names, *of_parts, *self.measures]
        self.first: tuple[int, Outputs] | None = None  # step and outputs of the first evaluation of this process
        if self.names:
            self._report_collection()

    def _report_collection(self) -> None:
        collection, absent = self.collection, self.collection.not_in_corpus
        what = f"{collection.source}: {len(collection.queries):,} queries, {len(collection.documents):,} documents"
        logger.info("validation on %s", what)
        if self.without_relevant:
            texts = [collection.queries[query] for query in self.without_relevant]
            message = "%s: %d queries have no relevant document and are in no mean: %s"
            logger.warning(message, collection.source, len(texts), first_texts(texts))
        if absent:
            message = "%s: %d relevant documents are not in the corpus and count as not found: %s"
            logger.warning(message, collection.source, len(absent), first_texts(absent))

    def __call__(self, model: nn.Module, step: int) -> dict[str, float]:
        """Finite values, equal on all processes; TrainingError, on all, where what the model gives is not. step:
        optimizer steps done."""
        outputs = self.encoding(model)
        return on_main(lambda: self._values(*outputs, step))

    def _values(self, queries: Outputs, documents: Outputs, step: int) -> dict[str, float]:
        values = {name: measure(queries, documents) for name, measure in self.measures.items()}
        per_query: PerQuery = {}
        if self.names:
            runs = rankings(self.collection, self.objective, queries, documents, self.depth, self.device)
            *parts, whole = runs
            per_query = self._per_query(runs[whole], self.names)
            values |= means(per_query)
            for part in parts:
                of_part = means(self._per_query(runs[part], self.names))
                values |= {f"{part}/{name}": value for name, value in of_part.items()}
            values |= self._at_widths(queries, documents)
            values["queries"] = len(self.collection.queries) - len(self.without_relevant)
            values["queries_without_relevant"] = len(self.without_relevant)
        if DENSE in documents:
            values["mean_cosine"] = mean_cosine(documents[DENSE].values.numpy())
            self._check_spread(values["mean_cosine"], step)
        self._check_change(queries, documents, step)
        values = {name: value for name, value in values.items() if math.isfinite(value)}
        return values | self._beside_start(values, per_query, step)

    def _at_widths(self, queries: Outputs, documents: Outputs) -> dict[str, float]:
        values = {}
        for width in self.widths:
            cut = (finish(side[DENSE].values.numpy(), width, self.objective.normalize) for side in (queries, documents))
            run = ranked(self.collection, *cut, self.depth, self.device)
            values |= {f"{name}/{width}": value for name, value in means(self._per_query(run, self.names[:1])).items()}
        return values

    def _per_query(self, run: Run, names: Sequence[str]) -> PerQuery:
        per_query = query_metrics(self.collection.relevance, run, names)
        graded = [name for name in names if parse_metric(name)[0].reads == "grades"]
        for name, values in query_metrics(self.collection.qrels, run, graded, relevant_from=-math.inf).items():
            per_query[name] = {query: values[query] for query in per_query[name]}
        return per_query

    def _check_spread(self, cosine: float, step: int) -> None:
        if cosine > ONE_DIRECTION:
            logger.warning(
                "validation at step %d: all vectors point the same way, the mean cosine of documents is %.4f. A model "
                "that was never trained as an embedder may begin so. If it stays so, lower lr, raise temperature, give "
                "more negatives, and look whether pooling is the model's own",
                step, cosine,
            )  # fmt: skip

    def _check_change(self, queries: Outputs, documents: Outputs, step: int) -> None:
        some = ({name: entries.first(min(PROBES, len(entries.counts))) for name, entries in side.items()}
                for side in (queries, documents))  # fmt: skip
        probes = joined(list(some))
        if self.first is None:
            self.first = step, probes
            return
        before, outputs = self.first
        if difference(probes, outputs) < UNCHANGED:
            logger.warning(
                "validation at step %d: the model did not change since step %d, what it gives for %d texts is what it "
                "was. Raise lr, and look whether what should learn is frozen and whether the training loss is 0",
                step, before, len(next(iter(probes.values())).counts),
            )  # fmt: skip

    def _beside_start(self, values: dict[str, float], per_query: PerQuery, step: int) -> dict[str, float]:
        """The first metric before the first step, and the p-value of a paired test of the difference."""
        if self.start is None:
            return {}
        name = self.metrics[0]
        if step == 0:
            kept = {"value": values[name], "per_query": per_query.get(name, {})}
            with translate_storage_errors(self.start.parent):
                write_json(self.start, {"metric": name, "data": self.collection.checksum, **kept})
            return {}
        start = read_json(self.start)
        if (start.get("metric"), start.get("data")) != (name, self.collection.checksum):
            return {}  # the run began without validation, or with another one
        beside = {name + AT_START: start["value"]}
        if len(start["per_query"]) > 1:
            (compared,) = compare({name: start["per_query"]}, {name: per_query[name]}, "randomization", seed=0)
            report(compared)
            beside[name + P_VALUE] = compared.p_value
        return beside


def report(compared: Comparison) -> None:
    """One line of the log, and a warning where training harmed."""
    logger.info(
        "%s is %.4f, at the start %.4f: %+.4f [%+.4f, %+.4f], p %.4f (paired randomization test and 95%% interval over "
        "queries: %d better, %d worse, %d the same)",
        compared.metric, compared.after, compared.before, compared.difference, compared.low, compared.high,
        compared.p_value, compared.gained, compared.lost, compared.same,
    )  # fmt: skip
    if compared.difference < 0 and compared.p_value < SIGNIFICANT:
        logger.warning(
            "%s is lower than before training. Lower lr, look for relevant documents among the negatives, and whether "
            "prompts and pooling are the model's own",
            compared.metric,
        )


def mean_cosine(vectors: np.ndarray) -> float:
    """Of all pairs of different rows: (|sum of unit vectors|^2 - n) / (n (n - 1)); NaN for fewer than two."""
    count = len(vectors)
    lengths = np.maximum(np.linalg.norm(vectors, axis=1), 1e-12)
    total = ((1 / lengths) @ vectors).astype(np.float64)
    return float((total @ total - count) / (count * (count - 1))) if count > 1 else math.nan
