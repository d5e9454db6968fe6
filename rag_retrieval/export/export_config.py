"""What `rag-retrieval export` can be told: every key with its type, range and meaning.

Easy to get wrong: `force` lifts the limits of int8 alone. A float32 graph that differs from the model is wrong, and is
never kept.

Nothing here imports torch: a wrong configuration must be reported before anything heavy is loaded.
"""

from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, model_validator

from rag_retrieval.core.config_schema import ABSENT, Schema


class ExportConfig(BaseModel):
    """One export. Frozen; types are strict. Raises pydantic.ValidationError with every problem of the given values at
    once."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    model: str = Field(min_length=1, description="Folder, hub name, or package:NAME of the trained reranker.")
    output: str = Field(min_length=1, description="Folder to write; one that holds files is refused.")
    quantize: Literal["int8"] | None = Field(
        None, description="Weights and products in 8 bits: smaller, faster on a CPU, and a little less exact."
    )
    data: str | None = Field(
        None,
        min_length=1,
        description="Folder in BEIR layout, or a file of ranking records, to check the exported model on. Absent: "
        "pairs that come with the program, and no nDCG.",
    )
    split: str = Field("test", min_length=1, description="Of a BEIR folder: the qrels/SPLIT.tsv.")
    queries: int = Field(100, ge=1, description="Judged queries of the data that are checked, at most.")
    depth: int = Field(50, ge=1, description="BM25's candidates of each query that are scored, in documents.")
    force: bool = Field(False, description="Keep an int8 model that differs by more than the limits.")

    @model_validator(mode="before")
    @classmethod
    def _leave_out_absent(cls, data: Any) -> Any:
        return {key: value for key, value in data.items() if value not in ABSENT or key not in cls.model_fields}


EXPORTING = Schema(
    ExportConfig,
    "model: runs/my/model",
    models=("model",),
    paths=("data",),
    outputs=("output",),
)
