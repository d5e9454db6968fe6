"""What an evaluation can be told, from a YAML file and from options: the same keys, and options win.

Easy to get wrong: `calibrate` is a split or a file, and a file only where it is written as one: `./dev`, `dev.jsonl`.

Nothing here imports torch: a wrong configuration must be reported before anything heavy is loaded.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

from rag_retrieval.core.config_schema import ABSENT, Schema, problem
from rag_retrieval.evaluate.bm25 import BM25
from rag_retrieval.metrics import METRICS, PATTERNS, parse_metric

GRADED = " and ".join(metric.name for metric in METRICS.values() if metric.reads == "grades")
DEFAULT_MEASURES = ("ndcg@10", "mrr@10", "map", "recall@10", "recall@100", "p@10")


class EvaluationConfig(BaseModel):
    """One evaluation. Frozen; types are strict. Raises pydantic.ValidationError with every problem of the given values
    at once."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(min_length=1, description="Folder, hub name, or package:NAME of the reranker.")
    data: str = Field(min_length=1, description="Folder in BEIR layout, or a file of ranking records.")
    split: str = Field("test", min_length=1, description="Of a BEIR folder: the qrels/SPLIT.tsv to measure on.")
    candidates: str = Field(
        BM25,
        min_length=1,
        description="bm25, or a TREC run file whose documents are reranked. Where the data list "
        "their own candidates (candidates.SPLIT.tsv, the documents of a record), only those are ranked.",
    )
    depth: int = Field(100, ge=1, description="Candidates of a query, in documents.")
    measures: tuple[str, ...] = Field(
        DEFAULT_MEASURES, description=f"Of {PATTERNS}; the first one orders gains and losses."
    )
    relevant_from: int = Field(1, ge=1, description=f"Smallest grade of a relevant document, for all but {GRADED}.")
    baseline: str | None = Field(
        None,
        min_length=1,
        description="What to compare with: bm25, a TREC run file, or another model, which reranks "
        "the same candidates. Absent: the candidates in their own order.",
    )
    significance: Literal["randomization", "t"] = Field(
        "randomization", description="Paired randomization test with a bootstrap interval, or paired t-test."
    )
    calibrate: str | None = Field(
        None,
        min_length=1,
        description="Split (of a BEIR folder) or file to fit temperature and bias on, not the one "
        "that is measured on; they are saved as calibration.json in the model's folder.",
    )
    calibration_dir: str | None = Field(
        None, min_length=1, description="Where calibration.json goes instead, for a model's folder that is read-only."
    )
    report: bool = Field(False, description="Write report.html and its figures into output_dir (needs matplotlib).")
    training_run: str | None = Field(
        None,
        min_length=1,
        description="Folder of the training run whose curves the report shows. Absent: the folder "
        "that the model's folder lies in, where it holds a metrics.jsonl.",
    )
    output_dir: str | None = Field(
        None,
        min_length=1,
        description="Where run.trec, per_query.jsonl and result.json go, and unfinished scores, "
        "from which the same command goes on. Absent: runs/evaluate/MODEL-DATA.",
    )
    max_len: int | None = Field(None, ge=16, description="Longest pair, in tokens. Absent: the model's own.")
    batch_size: int = Field(256, ge=1, description="Pairs of one forward, at most.")
    precision: Literal["no", "bf16", "fp16"] | None = Field(
        None, description="Of the scoring. Absent: half precision on a GPU, none on a CPU."
    )
    seed: int = Field(0, ge=0, description="Of the randomization test and the bootstrap.")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_absent(cls, data: Any) -> Any:
        given = {key: value for key, value in data.items() if value not in ABSENT or key not in cls.model_fields}
        if given.get("precision") is False:
            given["precision"] = "no"  # YAML reads a bare `no` as False
        return given

    @field_validator("measures", mode="before")
    @classmethod
    def _split_measures(cls, value: Any) -> Any:
        names = value.split(",") if isinstance(value, str) else value
        is_list = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        return tuple(name.strip() for name in names) if is_list else names

    @field_validator("measures")
    @classmethod
    def _known_measures(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if not value:
            raise problem("found none; expected at least one, such as ndcg@10")
        try:
            for name in value:
                parse_metric(name)
        except ValueError as error:
            raise problem(str(error)) from error
        return tuple(dict.fromkeys(value))


EVALUATION = Schema(
    EvaluationConfig,
    "model: runs/my/model",
    models=("model", "baseline"),
    datasets=("baseline",),
    folders=("training_run",),
    paths=("data", "candidates"),
    files=("calibrate",),
    outputs=("output_dir", "calibration_dir"),
    words={"candidates": (BM25,), "baseline": (BM25,)},
)
