"""`evaluate_reranker`: rerank the candidates of judged queries, measure, compare, calibrate, write it all down.

What a reader would get wrong: scoring is for all processes of a launch together and files are the main process's,
but figures are computed by each alone, from the same run and seed: sending them would mean sending the corpus.
"""

import importlib.util
from dataclasses import dataclass
from pathlib import Path
from sys import maxsize

import numpy as np

from rag_retrieval.core.distributed import on_main, own_device, process_group
from rag_retrieval.data.beir import Run
from rag_retrieval.evaluate.bm25 import BM25
from rag_retrieval.evaluate.calibration_fit import (
    calibrated,
    calibration_error,
    fit_calibration,
    log_loss,
    scored_pairs,
)
from rag_retrieval.evaluate.candidate_scoring import HowToScore, score_candidates
from rag_retrieval.evaluate.comparison import Comparison, compare
from rag_retrieval.evaluate.evaluation_config import EvaluationConfig
from rag_retrieval.evaluate.moves import QueryChange, largest_changes
from rag_retrieval.evaluate.output_folder import held
from rag_retrieval.evaluate.ranking_data import RankingData, read_ranking_data
from rag_retrieval.metrics import PerQuery, is_relevant, perfect_run, query_metrics
from rag_retrieval.models.calibration import Calibration, write_calibration
from rag_retrieval.models.open import open_scorer
from rag_retrieval.models.options import ModelOptions
from rag_retrieval.models.pair_encoding import PairEncoder
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.settings import PACKAGE_PREFIX

LIBRARIES = ("bm25s", "Stemmer", "scipy")  # the modules of the extra `evaluate`, but for jieba
SAMPLE = 5000  # pairs whose tokens are counted


@dataclass(frozen=True)
class System:
    """One ranking of the queries: what it is called, its scores, and its figures per query."""

    name: str
    run: Run
    per_query: PerQuery


@dataclass(frozen=True)
class ProbabilityFigures:
    """Of the model's probabilities on the measured pairs: log loss in nats and expected calibration error, raw (the
    sigmoid of the score) and with the calibration, which is None where the model has none."""

    calibration: Calibration | None
    raw_log_loss: float
    raw_error: float
    log_loss: float | None
    error: float | None


@dataclass(frozen=True)
class Evaluation:
    """before: the baseline. after: the model. ceiling: a perfect reranker of the model's candidates.

    comparisons: of before and after, for each measure; none for a single query. changes: (gained, lost) most by the
    first measure. token_lengths: int, of a sample of the pairs, before they are cut at max_len tokens.
    """

    config: EvaluationConfig
    data: RankingData
    before: System
    after: System
    ceiling: System
    comparisons: list[Comparison]
    changes: tuple[list[QueryChange], list[QueryChange]]
    probabilities: ProbabilityFigures
    token_lengths: np.ndarray
    max_len: int
    output_dir: Path

    def relevant(self, query: str) -> int:
        """The number of relevant documents of a query, among its candidates or not."""
        return int(is_relevant(list(self.data.qrels[query].values()), self.config.relevant_from).sum())

    @property
    def measured(self) -> list[str]:
        """The judged queries with a relevant document, in the order of the data: the figures are of these."""
        return list(next(iter(self.after.per_query.values())))

    @property
    def left_out(self) -> list[str]:
        """The judged queries without a relevant document."""
        measured = set(self.measured)
        return [query for query in self.data.qrels if query not in measured]


def evaluate_reranker(config: EvaluationConfig) -> Evaluation:
    """Score the candidates of `config.data` with `config.model`, measure, and compare with the baseline.

    Under `accelerate launch` every process calls it. Scores go to `config.output_dir` as they come; the same call
    after a kill goes on. Raises ValueError for a model, data or files that cannot be used, and where
    `config.output_dir` is in use or has the results of another model or other data.
    """
    with process_group():
        check(config)
        data = read_ranking_data(config.data, config.split, config.candidates, config.depth)
        if not any(is_relevant(list(grades.values()), config.relevant_from).any() for grades in data.qrels.values()):
            raise ValueError(
                f"{data.name}: none of the {len(data.qrels)} judged queries has a document of grade "
                f"{config.relevant_from} or more, so that there is nothing to measure; look at relevant_from."
            )
        output_dir = Path(config.output_dir or default_output_dir(config.model, data.name))
        with held(output_dir, config.model_dump(mode="json")):
            scorer = open_scorer(config.model, model_options(config))
            how = HowToScore(config.batch_size, config.precision)
            if config.calibrate is not None:
                scorer.calibration = calibrate(config, scorer, output_dir, how)
            run = score_candidates(scorer, name_of(config.model), data, output_dir / "run.trec", how)
            baseline = baseline_run(config, data, output_dir, how)
            return measured(config, data, run, baseline, scorer, output_dir)


def model_options(config: EvaluationConfig) -> ModelOptions:
    return ModelOptions(max_length=config.max_len, device=str(own_device()))


def check(config: EvaluationConfig) -> None:
    """Raises ValueError for what can be told before anything is loaded."""
    needed = [*LIBRARIES, *(["matplotlib"] if config.report else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ValueError(f"evaluation needs {', '.join(missing)}; run: pip install -e '.[evaluate,report]'")
    if config.calibrate is None:
        return
    folder = Path(config.model)
    if config.model.startswith(PACKAGE_PREFIX) or not folder.is_dir():
        raise ValueError(
            f"calibrate: the calibration is saved with the model, and {config.model} is no folder of yours."
        )
    is_file = not Path(config.data).is_dir()
    same_file = Path(config.calibrate).resolve() == Path(config.data).resolve()
    if same_file if is_file else config.calibrate == config.split:
        raise ValueError(f"calibrate: {config.calibrate} is measured on; fit on other queries, such as a dev split.")


def name_of(model: str) -> str:
    """What a model is called in files and tables: its path from the current folder, or its name."""
    return str(Path(model).relative_to(Path.cwd())) if Path(model).is_relative_to(Path.cwd()) else model


def default_output_dir(model: str, data_name: str) -> Path:
    """runs/evaluate/MODEL-DATA; a run's model is called by its run: runs/my/model is `my`."""
    parts = [part for part in Path(model.removeprefix(PACKAGE_PREFIX)).parts if part not in ("/", "model")]
    return Path("runs") / "evaluate" / "-".join([parts[-1] if parts else "model", *data_name.split()])


def calibrate(config: EvaluationConfig, scorer: PairScorer, output_dir: Path, how: HowToScore) -> Calibration:
    """Fit on the candidates of `config.calibrate` and save in the model's folder."""
    split, path = config.calibrate, config.data
    if not Path(path).is_dir():
        split, path = config.split, config.calibrate
    data = read_ranking_data(path, split, BM25, config.depth)
    run = score_candidates(scorer, name_of(config.model), data, output_dir / "calibration.trec", how)

    def fit_and_save() -> Calibration:
        scores, relevant = scored_pairs(run, data.qrels, config.relevant_from)
        calibration = fit_calibration(scores, relevant, data.name)
        write_calibration(Path(config.model), calibration)
        return calibration

    return on_main(fit_and_save)


def baseline_run(config: EvaluationConfig, data: RankingData, output_dir: Path, how: HowToScore) -> tuple[str, Run]:
    """What the model is compared with: its name and its run."""
    if config.baseline is None:
        return data.source, data.candidates
    if config.baseline == BM25 or Path(config.baseline).is_file():
        depth = config.depth if config.baseline == BM25 else maxsize
        other = read_ranking_data(config.data, config.split, config.baseline, depth)
        return other.source, other.candidates
    scorer = open_scorer(config.baseline, model_options(config))
    name = name_of(config.baseline)
    return name, score_candidates(scorer, name, data, output_dir / "baseline.trec", how)


def measured(
    config: EvaluationConfig,
    data: RankingData,
    run: Run,
    baseline: tuple[str, Run],
    scorer: PairScorer,
    output_dir: Path,
) -> Evaluation:
    """All figures of two runs."""
    before, after, ceiling = (
        System(name, ranking, query_metrics(data.qrels, ranking, config.measures, config.relevant_from))
        for name, ranking in (
            baseline,
            (name_of(config.model), run),
            ("a perfect order", perfect_run(data.qrels, data.candidates)),
        )
    )
    several = len(next(iter(after.per_query.values()))) > 1
    comparisons = compare(before.per_query, after.per_query, config.significance, config.seed) if several else []
    first = config.measures[0]
    changes = largest_changes(data, before.per_query, after.per_query, (before.run, after.run), first)
    probabilities = probability_figures(*scored_pairs(run, data.qrels, config.relevant_from), scorer.calibration)
    return Evaluation(
        config=config,
        data=data,
        before=before,
        after=after,
        ceiling=ceiling,
        comparisons=comparisons,
        changes=changes,
        probabilities=probabilities,
        token_lengths=token_lengths(scorer.pair_encoder, data),
        max_len=scorer.pair_encoder.max_length,
        output_dir=output_dir,
    )


def token_lengths(encoder: PairEncoder, data: RankingData) -> np.ndarray:
    """Tokens of at most about `SAMPLE` pairs evenly from all, before they are cut: int, [pairs]."""
    places = [(query, document) for query, documents in data.candidates.items() for document in documents]
    sample = places[:: max(1, len(places) // SAMPLE)]
    queries = encoder.query_ids([data.queries[query] for query, _ in sample])
    documents = encoder.document_ids([data.documents[document] for _, document in sample])
    return np.array([encoder.untruncated_length(*pair) for pair in zip(queries, documents, strict=True)])


def probability_figures(
    scores: np.ndarray, relevant: np.ndarray, calibration: Calibration | None
) -> ProbabilityFigures:
    """scores: [pairs], float64; relevant: [pairs], bool."""
    raw = calibrated(scores, None)
    figures = ProbabilityFigures(calibration, log_loss(raw, relevant), calibration_error(raw, relevant), None, None)
    if calibration is None:
        return figures
    values = calibrated(scores, calibration)
    return ProbabilityFigures(
        calibration,
        figures.raw_log_loss,
        figures.raw_error,
        log_loss(values, relevant),
        calibration_error(values, relevant),
    )
