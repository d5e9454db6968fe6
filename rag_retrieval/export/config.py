"""The keys of `rag-retrieval export` and of `rag-retrieval push`."""

import os
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
from rag_retrieval.models.options import EmbedderOptions, ModelOptions

CALIBRATION_METHODS = ("max", "percentile", "entropy")
SCORING = Only("commands that score; export is in float32 on one device", lambda config: False)
CHECKED = Only("exports with data", lambda config: config.data is not None)
BEIR = Only("exports with data in BEIR layout", lambda config: config.data is not None and os.path.isdir(config.data))
INT8 = Only("quantize int8", lambda config: config.quantize is not None)
STATIC = Only("exports with calibrate_with", lambda config: config.calibrate_with is not None)
PERCENTILE = Only("calibration_method percentile", lambda config: config.calibration_method == "percentile")
SENT = Only("uploads, without dry_run", lambda config: config.dry_run is None)


class ExportConfig(ModelOptions, EmbedderOptions):
    """One export, of a reranker or an embedder: the folder says which. `force` lifts the limits of int8 alone: a
    float32 graph that differs from the model is wrong, and is never kept."""

    main_keys: ClassVar = ("model", "output", "quantize", "data", "calibrate_with")
    groups: ClassVar = ModelOptions.groups | {"model": "Export", "per_channel": "int8"}
    only_for: ClassVar = dict.fromkeys(("devices", "dtype", "precision"), SCORING)

    model: ModelName = Field(min_length=1, description="Folder, hub name, or package:NAME of the trained model.")
    output: OutputPath = Field(min_length=1, description="Folder to write; one that holds files is refused.")
    quantize: Literal["int8"] | None = key(
        "Weights and products in 8 bits: smaller, faster on a CPU, and a little less exact."
    )
    data: FileOrFolder | None = key(
        "Folder in BEIR layout, or a file of ranking records, to check the exported model on. Absent: pairs that come "
        "with the program, and no nDCG.",
        min_length=1,
    )
    split: str = key("Of a BEIR folder: the qrels/SPLIT.tsv.", "test", only=BEIR, min_length=1)
    queries: int = key("Judged queries of the data that are checked, at most.", 100, only=CHECKED, ge=1)
    depth: int = key("BM25's candidates of each query that are scored, in documents.", 50, only=CHECKED, ge=1)
    documents: int = key(
        "Of an embedder: documents of the corpus that are searched, at most; always those that are relevant or "
        "candidates, and others evenly from all.",
        20_000, only=BEIR, ge=1,
    )  # fmt: skip
    graded_pairs: Annotated[str, Location(file=True)] | None = key(
        "A file of pairs with labels (query, content, label) to measure Spearman's correlation with the labels on.",
        min_length=1,
    )
    per_channel: bool = key(
        "A scale for each output channel of a product's weights, in place of one for all.", True, only=INT8
    )
    calibrate_with: FileOrFolder | None = key(
        "Texts to calibrate static int8 on: a folder in BEIR layout, a file of ranking records, or for an embedder a "
        ".txt file with a document in each line. Absent: dynamic int8, with a scale for each token.",
        only=INT8, min_length=1,
    )  # fmt: skip
    calibration_texts: int = key(
        "Pairs, or lines of a .txt file, that are calibrated on, at most: evenly from all.", 256, only=STATIC, ge=1
    )
    calibration_method: Literal[CALIBRATION_METHODS] = key(
        "Which range of an activation the 8 bits cover: max, of all values; percentile, without the outermost; "
        "entropy, that of the least KL divergence.",
        "max", only=STATIC,
    )  # fmt: skip
    calibration_percentile: float = key(
        "Values of an activation that its range covers, in percent.", 99.99, only=PERCENTILE, gt=50, le=100
    )
    exclude_layers: Annotated[list[str], NAMES] | None = key(
        "Layers that stay in float32, by name or pattern, such as encoder.layer.11.* or *.output.dense; auto: what "
        "each costs is measured, and the fewest of the costliest are left out that bring int8 within its limits.",
        only=INT8, min_length=1,
    )  # fmt: skip
    force: bool = key("Keep an int8 model that differs by more than the limits.", False, only=INT8)


class PushConfig(Config):
    """One upload. There is no key for a token: command lines are visible in the process list and in the history."""

    main_keys: ClassVar = ("model", "repo_id", "dry_run", "license", "evaluations")

    model: FolderPath = Field(min_length=1, description="Folder of the model.")
    repo_id: str = Field(min_length=1, description="Where to: ORGANISATION/NAME.")
    private: bool = key("Whether a repository that is made now is private.", True, only=SENT)
    language: Annotated[tuple[str, ...], NAMES] = key("Languages for the card, by their codes: en,zh.", ())
    license: str | None = key("The licence for the card, by the hub's id: mit.", min_length=1)
    evaluations: Annotated[tuple[FileOrFolder, ...], NAMES] = key(
        "Folders that `rag-retrieval evaluate` wrote for this model; their figures join the card.", ()
    )
    commit_message: str = key("Of the commit on the hub.", "Upload a model", only=SENT, min_length=1)
    dry_run: OutputPath | None = key(
        "A new folder, which gets what would be uploaded; nothing is sent.", min_length=1
    )

    @field_validator("dry_run")
    @classmethod
    def _names_a_folder(cls, value: str | None) -> str | None:
        if value is not None and value.lower() in ("true", "false"):
            raise ValueError(f"expected a folder to write to, found {value}; for example look")
        return value
