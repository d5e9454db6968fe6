"""What an evaluation can be told, from a YAML file and from options: the same keys, and options win.

Easy to get wrong: paths are looked up from the current folder, also those in a file.
"""

import difflib
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from rag_retrieval.evaluate.measures import DEFAULT_MEASURES, check_measures

USAGE = "usage: rag-retrieval evaluate --model DIR --data DIR [--config FILE] [--KEY VALUE ...]"


class EvaluationConfig(BaseModel):
    """One evaluation. Raises pydantic.ValidationError with every problem of the given values at once."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str = Field(min_length=1, description="Folder, hub name, or package:NAME of the reranker.")
    data: str = Field(min_length=1, description="Folder in BEIR layout, or a file of ranking records.")
    split: str = Field("test", min_length=1, description="Of a BEIR folder: the qrels/SPLIT.tsv to measure on.")
    candidates: str = Field(
        "bm25",
        min_length=1,
        description="bm25, or a TREC run file whose documents are reranked. Where the data list "
        "their own candidates (candidates.SPLIT.tsv, the documents of a record), only those are ranked.",
    )
    depth: int = Field(100, ge=1, description="Candidates of a query, in documents.")
    measures: tuple[str, ...] = Field(
        DEFAULT_MEASURES, description="ndcg@k, mrr@k, map, recall@k and p@k; the first one orders gains and losses."
    )
    relevant_from: int = Field(1, ge=1, description="Smallest grade of a relevant document, for all but ndcg.")
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
        "that is measured on; they are saved in the model's folder.",
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

    @field_validator("measures", mode="before")
    @classmethod
    def _split_measures(cls, value: Any) -> Any:
        return tuple(name.strip() for name in value.split(",")) if isinstance(value, str) else value

    @field_validator("measures")
    @classmethod
    def _known_measures(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        check_measures(value)
        return tuple(dict.fromkeys(value))


def load_evaluation_config(arguments: list[str]) -> EvaluationConfig:
    """The configuration of `--config FILE` and `--key value` or `--key=value`. Raises ValueError with a line for
    each problem."""
    given = read_options(arguments)
    file = given.pop("config", None)
    values = (read_yaml(Path(file)) if file is not None else {}) | given
    try:
        return EvaluationConfig(**values)
    except ValidationError as error:
        problems = [describe_problem(entry) for entry in error.errors(include_url=False)]
        raise ValueError("\n".join(problems)) from None


def read_options(arguments: list[str]) -> dict[str, Any]:
    """Values by key; `--report` alone means true."""
    given, rest = {}, list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("--"):
            raise ValueError(f"{argument}: unexpected; options are written --key value\n{USAGE}")
        name, equals, text = argument[2:].partition("=")
        if not equals and rest and not rest[0].startswith("--"):
            text = rest.pop(0)
        elif not equals and name == "report":
            text = "true"
        elif not equals:
            raise ValueError(f"--{name}: needs a value")
        given[name.replace("-", "_")] = text
    return given


def read_yaml(file: Path) -> dict[str, Any]:
    if not file.is_file():
        raise ValueError(f"{file}: no such file; expected a YAML file (the current folder is {Path.cwd()})")
    try:
        values = yaml.safe_load(file.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{file}: broken YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file}: expected lines such as `model: runs/my/model`")
    return values


def describe_problem(entry: dict[str, Any]) -> str:
    key = str(entry["loc"][0])
    if entry["type"] == "extra_forbidden":
        nearest = difflib.get_close_matches(key, EvaluationConfig.model_fields, n=1)
        return f"{key}: unknown key; " + (f"did you mean {nearest[0]}?" if nearest else "--help lists all keys")
    if entry["type"] == "missing":
        return f"{key}: is missing; {EvaluationConfig.model_fields[key].description}"
    if entry["type"] == "value_error":
        return str(entry["ctx"]["error"])
    return f"{key}: {entry['msg'][0].lower()}{entry['msg'][1:]}, found {entry['input']!r}"


def describe_options() -> str:
    lines = [USAGE, "", "Every key of the YAML file is also an option and wins over the file.", ""]
    for key, field in EvaluationConfig.model_fields.items():
        default = field.default if not isinstance(field.default, tuple) else ",".join(field.default)
        shown = " (required)" if field.is_required() else "" if default is None else f" [{default}]"
        lines += [f"  --{key}{shown}", f"      {field.description}"]
    return "\n".join(lines)
