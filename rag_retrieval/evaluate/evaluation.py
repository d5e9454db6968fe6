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
from rag_retrieval.data.beir import Run
from rag_retrieval.evaluate.calibration import ProbabilityErrors, fit_calibration, probability_errors, scored_pairs
from rag_retrieval.evaluate.config import EvaluationConfig
from rag_retrieval.evaluate.ranking_data import RankingData, read_ranking_data
from rag_retrieval.evaluate.scoring import locked_output_dir, score_candidates
from rag_retrieval.evaluate.systems import (
    Evaluation,
    System,
    check_relevant,
    compared,
    default_output_dir,
    largest_changes,
    name_of,
    system_of,
)
from rag_retrieval.infer.backend import open_backend
from rag_retrieval.infer.listwise import ListwiseReranker
from rag_retrieval.infer.reranker import Reranker
from rag_retrieval.metrics import perfect_run
from rag_retrieval.models.calibration import Calibration, write_calibration
from rag_retrieval.models.pair_encoding import PairEncoder
from rag_retrieval.models.settings import PACKAGE_PREFIX
from rag_retrieval.retrieval.bm25 import BM25

LIBRARIES = ("bm25s", "Stemmer")  # the modules of the extra `evaluate`, but for jieba
SAMPLE = 5000  # pairs whose tokens are counted


@dataclass(frozen=True)
class RerankerEvaluation(Evaluation):
    """before: the baseline. after: the model. ceiling: a perfect reranker of the model's candidates.

    token_lengths: int, of a sample of the pairs, before they are truncated to max_len tokens. None of these two, nor
    probabilities, of a listwise reranker, which scores no pairs.
    """

    ceiling: System
    probabilities: ProbabilityErrors | None
    token_lengths: np.ndarray | None
    max_len: int | None


def evaluate_reranker(config: EvaluationConfig) -> RerankerEvaluation:
    """Score the candidates of `config.data` with `config.model`, measure, and compare with the baseline.

    Under `accelerate launch` every process calls it. Scores go to `config.output_dir` as they come; the same call
    after a kill continues. Raises ValueError for a model, data or files that cannot be used, and where
    `config.output_dir` is in use or has the results of another model or other data.
    """
    with process_group():
        check(config)
        data = read_data(config, config.data, config.split, config.candidates, config.depth)
        check_relevant(data.name, data.qrels, config)
        output_dir = Path(config.output_dir or default_output_dir(config.model, data.name))
        with locked_output_dir(output_dir, config.model_dump(mode="json")):
            reranker = open_listwise(config) if config.listwise else open_reranker(config.model, config)
            if config.calibrate is not None:
                reranker.backend.calibration = calibrate(config, reranker, output_dir)
            run = score_candidates(reranker, name_of(config.model), data, output_dir / "run.trec", config).run
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
    run = score_candidates(reranker, name_of(config.model), data, output_dir / "calibration.trec", config).run

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
    return name, score_candidates(reranker, name, data, output_dir / "baseline.trec", config).run


def measure(
    config: EvaluationConfig,
    data: RankingData,
    run: Run,
    baseline: tuple[str, Run],
    reranker: Reranker | ListwiseReranker,
    output_dir: Path,
) -> RerankerEvaluation:
    """All figures of two runs."""
    runs = baseline, (name_of(config.model), run), ("a perfect order", perfect_run(data.qrels, data.candidates))
    before, after, ceiling = (system_of(name, ranking, data.qrels, config) for name, ranking in runs)
    of_pairs = None, None, None
    if isinstance(reranker, Reranker):
        encoder, calibration = reranker.backend.pair_encoder, reranker.backend.calibration
        errors = probability_errors(*scored_pairs(run, data.qrels, config.relevant_from), calibration)
        of_pairs = errors, token_lengths(encoder, data), encoder.max_length
    return RerankerEvaluation(
        config=config,
        data=data,
        before=before,
        after=after,
        ceiling=ceiling,
        comparisons=compared(before, after, config),
        changes=largest_changes(data.qrels, before, after, config.measures[0]),
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
