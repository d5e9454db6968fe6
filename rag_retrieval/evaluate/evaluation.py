"""`evaluate_reranker`: rerank the candidates of judged queries, measure, compare, calibrate.

Scoring is for all processes of a launch together and files are the main process's, but figures are computed by each
alone, from the same run and seed: sending them would mean sending the corpus.
"""

import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from sys import maxsize

import numpy as np

from rag_retrieval.core.distributed import on_main, own_device, process_group
from rag_retrieval.data.beir import Qrels, Run
from rag_retrieval.evaluate.calibration import ProbabilityErrors, fit_calibration, probability_errors, scored_pairs
from rag_retrieval.evaluate.config import EvaluationConfig
from rag_retrieval.evaluate.ranking_data import RankingData, read_ranking_data
from rag_retrieval.evaluate.scoring import locked_output_dir, score_candidates
from rag_retrieval.infer.backend import open_backend
from rag_retrieval.infer.listwise import ListwiseReranker
from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.metrics import PerQuery, is_relevant, perfect_run, query_metrics, trec_order
from rag_retrieval.models.calibration import Calibration, write_calibration
from rag_retrieval.models.pair_encoding import PairEncoder
from rag_retrieval.models.settings import PACKAGE_PREFIX
from rag_retrieval.retrieval.bm25 import BM25
from rag_retrieval.significance import Comparison, compare

LIBRARIES = ("bm25s", "Stemmer")  # the modules of the extra `evaluate`, but for jieba
SAMPLE = 5000  # pairs whose tokens are counted
SHOWN_QUERIES = 3  # that gained, and that lost
SHOWN_DOCUMENTS = 4


@dataclass(frozen=True)
class System:
    """One ranking of the queries: its name, its scores, and its figures per query."""

    name: str
    run: Run
    per_query: PerQuery


@dataclass(frozen=True)
class RankChange:
    """A document's ranks, from 1, in both runs; None where a run does not have it. grade: None unjudged."""

    document: str
    grade: int | None
    before: int | None
    after: int | None

    @property
    def weight(self) -> float:
        """The change of the discount 1 / log2(rank + 1), and twice that where a metric counts the document."""
        old, new = (0.0 if rank is None else 1 / np.log2(rank + 1) for rank in (self.before, self.after))
        return abs(new - old) * (2 if (self.grade or 0) > 0 else 1)

    def as_text(self) -> tuple[str, str]:
        """Grade, and ranks as `3 -> 1`; - where there is none."""
        grade, before, after = ("-" if value is None else str(value) for value in (self.grade, self.before, self.after))
        return grade, f"{before} -> {after}"


@dataclass(frozen=True)
class QueryChange:
    """The value of one metric for a query before and after, and its documents that changed rank, by their new one."""

    query: str
    before: float
    after: float
    documents: list[RankChange]


@dataclass(frozen=True)
class Evaluation:
    """before: the baseline. after: the model. ceiling: a perfect reranker of the model's candidates.

    comparisons: of before and after, for each metric; none for a single query. changes: (gained, lost) most by the
    first metric. token_lengths: int, of a sample of the pairs, before they are truncated to max_len tokens. None of
    these two, nor probabilities, of a listwise reranker, which scores no pairs.
    """

    config: EvaluationConfig
    data: RankingData
    before: System
    after: System
    ceiling: System
    comparisons: list[Comparison]
    changes: tuple[list[QueryChange], list[QueryChange]]
    probabilities: ProbabilityErrors | None
    token_lengths: np.ndarray | None
    max_len: int | None
    output_dir: Path

    @property
    def measured(self) -> list[str]:
        """The judged queries with a relevant document, in the order of the data: the figures are of these."""
        return list(next(iter(self.after.per_query.values())))

    def relevant(self, query: str) -> int:
        """The number of relevant documents of a query, among its candidates or not."""
        return count_relevant(self.data, query, self.config)


def count_relevant(data: RankingData, query: str, config: EvaluationConfig) -> int:
    return int(is_relevant(list(data.qrels[query].values()), config.relevant_from).sum())


def evaluate_reranker(config: EvaluationConfig) -> Evaluation:
    """Score the candidates of `config.data` with `config.model`, measure, and compare with the baseline.

    Under `accelerate launch` every process calls it. Scores go to `config.output_dir` as they come; the same call
    after a kill continues. Raises ValueError for a model, data or files that cannot be used, and where
    `config.output_dir` is in use or has the results of another model or other data.
    """
    with process_group():
        check(config)
        data = read_data(config, config.data, config.split, config.candidates, config.depth)
        if not any(count_relevant(data, query, config) for query in data.qrels):
            raise ValueError(
                f"{data.name}: none of the {len(data.qrels)} judged queries has a document of grade "
                f"{config.relevant_from} or more; there is nothing to measure: lower relevant_from or judge more."
            )
        output_dir = Path(config.output_dir or default_output_dir(config.model, data.name))
        with locked_output_dir(output_dir, config.model_dump(mode="json")):
            reranker = open_listwise(config) if config.listwise else open_reranker(config.model, config)
            if config.calibrate is not None:
                reranker.backend.calibration = calibrate(config, reranker, output_dir)
            run = score_candidates(reranker, name_of(config.model), data, output_dir / "run.trec", config)
            baseline = baseline_run(config, data, output_dir)
            return measure(config, data, run, baseline, reranker, output_dir)


def open_reranker(name: str, config: EvaluationConfig) -> Reranker:
    return Reranker.from_backend(open_backend(name, config.model_options(own_device())))


def open_listwise(config: EvaluationConfig) -> ListwiseReranker:
    options = {name: getattr(config, name) for name in ("window", "step", "passage_tokens", "dtype")}
    device, remote_code = config.device or own_device(), config.trust_remote_code
    return ListwiseReranker(
        config.model, language=config.prompt_language, device=device, trust_remote_code=remote_code, **options
    )


def check(config: EvaluationConfig) -> None:
    """Raises ValueError for what can be known before anything is loaded."""
    needed = [*LIBRARIES, *(["matplotlib"] if config.report else [])]
    if missing := [name for name in needed if importlib.util.find_spec(name) is None]:
        raise ValueError(f"evaluation needs {', '.join(missing)}; run: pip install -e '.[evaluate,report]'")
    if config.calibrate is None:
        return
    folder = calibration_folder(config)
    if config.calibration_dir is None and (config.model.startswith(PACKAGE_PREFIX) or not folder.is_dir()):
        raise ValueError(
            f"calibrate: the calibration is saved with the model, and {config.model} is no folder of yours; set "
            "calibration_dir."
        )
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise ValueError(f"calibrate: {existing} cannot be written to; set calibration_dir to a folder that can.")
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


def read_data(config: EvaluationConfig, path: str, split: str, candidates: str, depth: int) -> RankingData:
    options = {"ignore_identical_ids": config.ignore_identical_ids, "language": config.language}
    return read_ranking_data(path, split, candidates, depth, **options)


def calibration_folder(config: EvaluationConfig) -> Path:
    return Path(config.calibration_dir or config.model)


def calibrate(config: EvaluationConfig, reranker: Reranker, output_dir: Path) -> Calibration:
    """Fit on the candidates of `config.calibrate` and save in the model's folder or `config.calibration_dir`."""
    split, path = config.calibrate, config.data
    if not Path(path).is_dir():
        split, path = config.split, config.calibrate
    data = read_data(config, path, split, BM25, config.depth)
    run = score_candidates(reranker, name_of(config.model), data, output_dir / "calibration.trec", config)

    def fit_and_save() -> Calibration:
        calibration = fit_calibration(*scored_pairs(run, data.qrels, config.relevant_from), data.name)
        folder = calibration_folder(config)
        folder.mkdir(parents=True, exist_ok=True)
        write_calibration(folder, calibration)
        return calibration

    return on_main(fit_and_save)


def baseline_run(config: EvaluationConfig, data: RankingData, output_dir: Path) -> tuple[str, Run]:
    """What the model is compared with: its name and its run."""
    if config.baseline is None:
        return data.source, data.candidates
    if config.baseline == BM25 or Path(config.baseline).is_file():
        depth = config.depth if config.baseline == BM25 else maxsize
        other = read_data(config, config.data, config.split, config.baseline, depth)
        return other.source, other.candidates
    reranker, name = open_reranker(config.baseline, config), name_of(config.baseline)
    return name, score_candidates(reranker, name, data, output_dir / "baseline.trec", config)


def measure(
    config: EvaluationConfig,
    data: RankingData,
    run: Run,
    baseline: tuple[str, Run],
    reranker: Reranker | ListwiseReranker,
    output_dir: Path,
) -> Evaluation:
    """All figures of two runs."""
    runs = baseline, (name_of(config.model), run), ("a perfect order", perfect_run(data.qrels, data.candidates))
    before, after, ceiling = (
        System(name, ranking, query_metrics(data.qrels, ranking, config.measures, config.relevant_from))
        for name, ranking in runs
    )
    first = config.measures[0]
    several = len(after.per_query[first]) > 1
    of_pairs = None, None, None
    if isinstance(reranker, Reranker):
        encoder, calibration = reranker.backend.pair_encoder, reranker.backend.calibration
        errors = probability_errors(*scored_pairs(run, data.qrels, config.relevant_from), calibration)
        of_pairs = errors, token_lengths(encoder, data), encoder.max_length
    return Evaluation(
        config=config,
        data=data,
        before=before,
        after=after,
        ceiling=ceiling,
        comparisons=compare(before.per_query, after.per_query, config.significance, config.seed) if several else [],
        changes=largest_changes(data.qrels, before.per_query, after.per_query, (before.run, after.run), first),
        probabilities=of_pairs[0],
        token_lengths=of_pairs[1],
        max_len=of_pairs[2],
        output_dir=output_dir,
    )


def token_lengths(encoder: PairEncoder, data: RankingData) -> np.ndarray:
    """Tokens of at most about `SAMPLE` pairs evenly from all, before they are truncated: int, [pairs]."""
    places = [(query, document) for query, documents in data.candidates.items() for document in documents]
    sample = places[:: max(1, len(places) // SAMPLE)]
    return encoder.untruncated_lengths([(data.queries[query], data.documents[document]) for query, document in sample])


# ---- gains and losses -----------------------------------------------------------------------------------


def largest_changes(
    qrels: Qrels, before: PerQuery, after: PerQuery, runs: tuple[Run, Run], metric: str
) -> tuple[list[QueryChange], list[QueryChange]]:
    """(gained most, lost most) by `metric`, at most `SHOWN_QUERIES` each, the largest first.

    runs: before and after. Queries with equal changes keep the order of the data.
    """
    gains = {query: after[metric][query] - value for query, value in before[metric].items()}
    gained = [query for query in sorted(gains, key=lambda query: -gains[query]) if gains[query] > 1e-12]
    lost = [query for query in sorted(gains, key=gains.get) if gains[query] < -1e-12]

    def change(query: str) -> QueryChange:
        documents = changed_documents(qrels[query], runs[0].get(query, {}), runs[1].get(query, {}))
        return QueryChange(query, before[metric][query], after[metric][query], documents)

    return [change(query) for query in gained[:SHOWN_QUERIES]], [change(query) for query in lost[:SHOWN_QUERIES]]


def changed_documents(grades: dict[str, int], before: dict[str, float], after: dict[str, float]) -> list[RankChange]:
    """The `SHOWN_DOCUMENTS` of most weight that have another rank, by their new rank."""
    old, new = ({document: rank for rank, document in enumerate(trec_order(run), start=1)} for run in (before, after))
    changes = [
        RankChange(document, grades.get(document), old.get(document), new.get(document))
        for document in old.keys() | new
        if old.get(document) != new.get(document)
    ]
    changes.sort(key=lambda change: (-change.weight, change.document))
    return sorted(changes[:SHOWN_DOCUMENTS], key=lambda change: (change.after or np.inf, change.document))
