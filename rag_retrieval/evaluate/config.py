"""The keys of an evaluation: those of every one, and those of rerankers. `calibrate` is a split or a file, and a file
only where it is written as one: `./dev`, `dev.jsonl`."""

import os
from collections.abc import Iterator
from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from rag_retrieval.core.config import (
    NAMES,
    Config,
    FileOrFolder,
    FolderPath,
    Location,
    ModelName,
    Only,
    OutputPath,
    key,
)
from rag_retrieval.data.readers import FILE_SUFFIXES, is_file_name
from rag_retrieval.data.words import AUTO
from rag_retrieval.metrics import METRICS, PATTERNS, parse_metric
from rag_retrieval.models.options import LongDocumentOptions, ModelOptions
from rag_retrieval.retrieval.bm25 import BM25

GRADED = " and ".join(metric.name for metric in METRICS.values() if metric.reads == "grades")
DEFAULT_MEASURES = ("ndcg@10", "mrr@10", "map", "recall@10", "recall@100", "p@10")
BEIR = Only(
    "data in BEIR layout", lambda config: any(os.path.isdir(path) for path in (config.data, config.calibrate or ""))
)
WORDS = Only(
    "runs that rank by BM25",
    lambda config: BM25 in (config.candidates, config.baseline) or config.calibrate is not None,
)
LISTWISE = Only("runs with listwise", lambda config: config.listwise)
PAIRWISE = Only("runs without listwise", lambda config: not config.listwise)
DRAWN = Only("significance randomization", lambda config: config.significance == "randomization")
CALIBRATED = Only("runs that calibrate", lambda config: config.calibrate is not None)
REPORTED = Only("runs with report", lambda config: config.report)
Baseline = Annotated[str, Location(file=True, folder=True, hub=True, package=True, words=(BM25,))]


class EvaluationKeys(Config):
    """The keys of every evaluation."""

    groups: ClassVar = {"data": "Data", "measures": "Figures", "report": "Output"}

    data: FileOrFolder = Field(
        min_length=1, description=f"Folder in BEIR layout, or a file of records ({FILE_SUFFIXES})."
    )
    split: str = key("Of a BEIR folder: the qrels/SPLIT.tsv to measure on.", "test", min_length=1)
    depth: int = key("Candidates of a query, in documents.", 100, ge=1)
    ignore_identical_ids: bool = key(
        "Whether a document with the id of the query is left out of its candidates, as in BEIR, some of whose queries "
        "are documents themselves (ArguAna, Quora).", True
    )
    checkpoints: FolderPath | None = key(
        "Folder of a training run, each of whose checkpoints is measured in place of one model; its curve goes to "
        "checkpoints.json and report.html (needs matplotlib).",
        min_length=1,
    )
    measures: Annotated[tuple[str, ...], NAMES] = key(
        f"Of {PATTERNS}; the first one orders gains, losses and checkpoints.", DEFAULT_MEASURES
    )
    relevant_from: int = key(f"Smallest grade of a relevant document, for all but {GRADED}.", 1, ge=1)
    significance: Literal["randomization", "t"] = key(
        "Paired randomization test with a bootstrap interval, or paired t-test.", "randomization"
    )
    seed: int = key("Of the randomization test and the bootstrap.", 0, only=DRAWN, ge=0)
    report: bool = key("Write report.html and its figures into output_dir (needs matplotlib).", False)

    @field_validator("measures")
    @classmethod
    def _known_measures(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        if not names:
            raise ValueError("found none; expected at least one, such as ndcg@10")
        for name in names:
            parse_metric(name)
        return tuple(dict.fromkeys(names))


class EvaluationConfig(ModelOptions, LongDocumentOptions, EvaluationKeys):
    """One evaluation of a reranker."""

    main_keys: ClassVar = ("model", "data", "split", "baseline", "output_dir")
    groups: ClassVar = EvaluationKeys.groups | ModelOptions.groups | {
        "long_document": "Long documents", "listwise": "Listwise", "model": "Reranker and candidates",
        "calibrate": "Calibration", "training_run": "Output", "batch_size": "Scoring",
    }  # fmt: skip

    listwise: bool = key(
        "Let the model, a chat model, order windows of documents (ListwiseReranker); a score is then 1 / rank.", False
    )
    window: int = key("Documents in one prompt.", 20, only=LISTWISE, ge=2)
    step: int = key("How far the window moves, in documents, at most window.", 10, only=LISTWISE, ge=1)
    passage_tokens: int = key("Tokens of a document that are read.", 256, only=LISTWISE, ge=1)
    prompt_language: Literal["en", "zh"] = key("Of the question.", "en", only=LISTWISE)

    model: ModelName | None = key(
        "Folder, hub name, or package:NAME of the reranker; needed without checkpoints.",
        derive=lambda config: config.checkpoints,
        min_length=1,
    )
    candidates: Annotated[str, Location(file=True, folder=True, words=(BM25,))] = key(
        "bm25, or a TREC run file whose documents are reranked. Where the data list "
        "their own candidates (candidates.SPLIT.tsv, the documents of a record), only those are ranked.",
        BM25,
        min_length=1,
    )
    language: str = key(
        "Of BM25's words: auto (by the script of each word; Latin is English), plain (as they are), or a Snowball "
        "stemmer such as german.", AUTO, only=WORDS, min_length=1
    )
    baseline: Baseline | None = key(
        "What to compare with: bm25, a TREC run file, or another model, which reranks "
        "the same candidates. Absent: the candidates in their own order.",
        min_length=1,
    )
    calibrate: Annotated[str, Location(file=True, is_file_name=is_file_name, only_files=True)] | None = key(
        "Split (of a BEIR folder) or file to fit temperature and bias on, not the one "
        "that is measured on; they are saved as calibration.json in the model's folder.",
        min_length=1,
    )
    calibration_dir: OutputPath | None = key(
        "Where calibration.json goes instead, for a model's folder that is read-only.",
        only=CALIBRATED,
        min_length=1,
    )
    training_run: FolderPath | None = key(
        "Folder of the training run whose curves the report shows. Absent: the folder "
        "that the model's folder lies in, where it holds a metrics.jsonl.",
        only=REPORTED,
        min_length=1,
    )
    output_dir: OutputPath | None = key(
        "Where run.trec, per_query.jsonl and result.json go, and unfinished scores, "
        "from which the same command continues. Absent: runs/evaluate/MODEL-DATA.",
        min_length=1,
    )
    batch_size: int = key("Pairs of one forward, at most.", 256, ge=1)

    only_for: ClassVar = dict.fromkeys(("split", "ignore_identical_ids"), BEIR) | dict.fromkeys(
        [*ModelOptions.model_fields.keys() - {"device", "dtype", "trust_remote_code"}, "long_document", "batch_size",
         "calibrate"],
        PAIRWISE,
    )  # fmt: skip

    def problems(self) -> Iterator[tuple[str, str]]:
        if self.model is None:
            yield "model", "is missing; expected the folder of a reranker, or checkpoints"
        if self.step > self.window:
            yield "step", f"expected at most window, which is {self.window}, found {self.step}"
