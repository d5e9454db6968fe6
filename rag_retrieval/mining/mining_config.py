"""What mining can be told: every key with its type, range and meaning, and which values do not fit each other.

Easy to get wrong: `None` in a finished configuration means "off" or "does not apply"; defaults that hang on
another key (`dense_batch_size`, `absolute_margin` with a reranker) are filled in before.

Nothing here imports torch: a wrong configuration must be reported before anything heavy is loaded.
"""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import InitErrorDetails

from rag_retrieval.core.config_schema import ABSENT, Schema, problem
from rag_retrieval.mining.mining_checks import cross_field_problems, derived_values


class MiningConfig(BaseModel):
    """The validated configuration of one run. Frozen; types are strict.

    Raises pydantic.ValidationError with every problem of the given values at once, cross-field ones included.
    """

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid", allow_inf_nan=False)

    # Data
    data: str = Field(
        min_length=1, description="A folder in BEIR layout, or a file of ranking records (its positives are used)."
    )
    split: str | None = Field(
        None, min_length=1, description="BEIR folder only: the queries of qrels/SPLIT.tsv. Default train."
    )
    corpus: str | None = Field(
        None,
        min_length=1,
        description="record file only: the documents, JSON lines with text and, if they have one, "
        "title (.jsonl, .jsonl.gz). A BEIR folder has its own.",
    )
    output: str = Field(min_length=1, description="The file to write, .jsonl or .jsonl.gz, from the current folder.")
    output_format: Literal["pos_neg", "hits", "pointwise"] = Field(
        "pos_neg", description="The trainer's formats: two lists, labelled documents, or one line for each pair."
    )
    labels: Literal["relevance", "score"] = Field(
        "relevance",
        description="What the records teach: relevance (that of the data, 0 for negatives), or the "
        "score that decided (the reranker's, else the candidates'), as a teacher's.",
    )
    overwrite: bool = Field(False, description="Replace output where it exists. Otherwise that is refused.")
    work_dir: str | None = Field(
        None,
        min_length=1,
        description="Folder for index, vectors and finished parts, kept for further runs. Absent: "
        "OUTPUT.work, removed when output is written.",
    )

    # Candidates
    candidates: Literal["bm25", "dense", "fused"] = Field(
        "bm25", description="Where they come from: words, vectors, or both by reciprocal rank fusion."
    )
    dense_model: str | None = Field(
        None,
        min_length=1,
        description="dense and fused only: a sentence-transformers folder, a plain encoder's, "
        "a hub name, or package:NAME.",
    )
    pooling: Literal["mean", "cls"] | None = Field(
        None, description="plain encoder only (others say it themselves): how token vectors become one. Default mean."
    )
    query_prefix: str | None = Field(
        None, description="Text before each query that is encoded, as E5's `query: `. Absent: the model's own prompt."
    )
    document_prefix: str | None = Field(
        None, description="Text before each document that is encoded. Absent: the model's own prompt."
    )
    dense_max_len: int | None = Field(
        None, ge=2, description="Tokens of a text that are encoded. Absent: the model's own maximum."
    )
    dense_batch_size: int | None = Field(None, ge=1, description="Texts encoded at once. Default 32.")
    similarity: Literal["cosine", "dot"] | None = Field(
        None, description="How vectors are compared: by angle, or by inner product. Default cosine."
    )
    vector_dtype: Literal["float16", "float32"] | None = Field(
        None, description="How vectors are kept on disk. Default float16."
    )
    faiss_index: str | None = Field(
        None,
        min_length=1,
        description="An index of FAISS by its factory name, such as IVF1024,Flat. Absent: exact "
        "search over all documents.",
    )

    # Negatives
    num_negatives: int = Field(7, ge=1, description="Negatives per query, at most.")
    first_rank: int = Field(1, ge=1, description="First rank of the window that negatives come from, counted from 1.")
    last_rank: int = Field(100, ge=1, description="Last rank of that window; also how many candidates are fetched.")
    sampling: Literal["random", "top"] = Field(
        "random", description="Draw among the candidates that fit, by the seed, or take the best ranked."
    )
    absolute_margin: float | None = Field(
        None,
        ge=0,
        description="A negative scores at least this much less than the query's lowest positive. With a "
        "reranker and none of absolute_margin, relative_margin, max_score: 0.",
    )
    relative_margin: float | None = Field(
        None, ge=0, lt=1, description="The same as a fraction of the positive's score: 0.05 keeps what has up to 95%."
    )
    max_score: float | None = Field(None, description="Highest score that a negative may have.")
    reranker: str | None = Field(
        None,
        min_length=1,
        description="A trained reranker, folder, hub name or package:NAME: its scores replace the "
        "candidates' for the margins and max_score, and in the output.",
    )
    seed: int = Field(42, ge=0, description="Seed of the draw.")
    device: str | None = Field(
        None, min_length=1, description="Of the models, such as cpu or cuda:1. Absent: a GPU if there is one."
    )

    @model_validator(mode="wrap")
    @classmethod
    def _report_all_and_resolve(cls, data: Mapping[str, Any], handler) -> "MiningConfig":
        values = {key: value for key, value in data.items() if value not in ABSENT}
        errors = []
        try:
            handler(values)
        except ValidationError as error:
            errors = [
                {part: entry.get(part, {}) for part in ("type", "loc", "input", "ctx")}
                for entry in error.errors(include_url=False)
            ]
        defaults = {key: field.default for key, field in cls.model_fields.items() if not field.is_required()}
        invalid = {entry["loc"][0] for entry in errors}
        valid = {key: value for key, value in (defaults | values).items() if key not in invalid}
        for key, message in cross_field_problems(valid):
            errors.append(InitErrorDetails(type=problem(message), loc=(key,), input=values.get(key)))
        if errors:
            raise ValidationError.from_exception_data(cls.__name__, errors)
        return handler(derived_values(valid) | values)


MINING = Schema(
    MiningConfig,
    "data: folder",
    models=("dense_model", "reranker"),
    paths=("data", "corpus"),
    outputs=("output", "work_dir"),
)
