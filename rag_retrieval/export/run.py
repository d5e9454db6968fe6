"""`export_model`: a reranker or embedder as ONNX, in float32 or int8, compared with it before the folder is kept.

Everything is written beside the output folder and renamed at the end. An export that fails, or that does not compute
what its model computes, leaves nothing behind.
"""

import os
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import onnx

from rag_retrieval.core.files import lock_file_of, locked
from rag_retrieval.core.log import Progress
from rag_retrieval.evaluate.systems import name_of
from rag_retrieval.export.calibrate import Range, activation_ranges, calibration_texts
from rag_retrieval.export.config import ExportConfig
from rag_retrieval.export.layer_costs import LayerCost, describe_costs, fewest_to_exclude, layer_costs
from rag_retrieval.export.onnx_graph import write_graph
from rag_retrieval.export.quantize import Layers, layers_of, quantize_int8
from rag_retrieval.export.source import Compute, Source, open_source
from rag_retrieval.export.verify import CheckData, Computed, Verification, check_float32, check_int8, read_check_data
from rag_retrieval.infer.onnx_folder import MODEL_FILE, OnnxDescription, write_description

LIBRARIES = ("rag-retrieval", "torch", "transformers", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """folder: what was written. problems: what is beyond the limits of int8 and was kept by `force`. int8: how it was
    made, None for float32."""

    folder: Path
    verification: Verification
    problems: list[str]
    int8: "Int8 | None"

    def describe(self) -> str:
        lines = [f"{self.folder}: {megabytes(self.folder):.1f} MB", f"  {self.verification.describe()}"]
        if self.int8 is not None:
            lines += self.int8.describe()
        return "\n".join([*lines, *(f"  kept by --force although {problem}" for problem in self.problems)])


@dataclass(frozen=True)
class Int8:
    """excluded_layers: that stay in float32. layer_costs: the costliest first, where they were measured.
    calibrated_with: a file or folder, None for dynamic int8; calibration_method: as of ExportConfig, None likewise."""

    excluded_layers: list[str]
    layer_costs: list[LayerCost]
    calibrated_with: str | None
    calibration_method: str | None

    def describe(self) -> list[str]:
        kept = f"  in float32: {', '.join(self.excluded_layers)}"
        costs = describe_costs(self.layer_costs, self.excluded_layers) if self.layer_costs else ""
        return [kept] * bool(self.excluded_layers) + [costs] * bool(costs)


def export_model(config: ExportConfig) -> Exported:
    """Write `config.output` and return what was measured.

    Raises ValueError for a model, data or an output folder that cannot be used, and DifferenceError for a float32 graph
    that does not compute what the model computes and for int8 beyond its limits without `force`.
    """
    output = Path(config.output)
    with locked(lock_file_of(output), f"output: another export is writing {output}; wait for it, or take another"):
        check_output(output)
        return write_folder(config, output)


def write_folder(config: ExportConfig, output: Path) -> Exported:
    source = open_source(config)
    check = read_check_data(config, source)
    expected = own_results(config.model, source, check)
    with folder_aside(output) as folder:
        description = write_float32(source, config, folder)
        # int8 is what is compared on all pairs; its float32 graph needs to be right, no more
        exported = check.computed(source.open_exported(folder), sample_alone=config.quantize is not None)
        check_float32(expected, exported)
        if config.quantize is None:
            verification, problems, int8 = check.compare(expected, exported), [], None
        else:
            description, verification, int8 = quantize_folder(config, source, check, expected, folder, description)
            problems = check_int8(verification, config.force)
        measured = asdict(verification) | (asdict(int8) if int8 else {}) | {"kept_by_force": problems}
        write_description(folder, replace(description, verification=measured))
        os.rename(folder, output)
    return Exported(output, verification, problems, int8)


def check_output(folder: Path) -> None:
    """Raises ValueError for a file and for a folder that is not empty."""
    if folder.is_file():
        raise ValueError(f"output: {folder} is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"output: {folder} holds files; name a new folder, or empty it first")


def own_results(model: str, source: Source, check: CheckData) -> Computed:
    """Raises ValueError for scores that are not finite."""
    with Progress(len(check.texts), "computing with the model", "texts") as progress:
        computed = check.computed(lambda texts: source.results(texts, progress))
    for scores in computed.scores.values():
        if not np.isfinite(scores).all():
            raise ValueError(f"{model}: computes {scores[~np.isfinite(scores)][0]}; are there NaN in its weights?")
    return computed


@contextmanager
def folder_aside(output: Path) -> Iterator[Path]:
    """A new folder beside `output` to write into, removed at the end where it is still there."""
    folder = output.with_name(f".{output.name}.unfinished")
    shutil.rmtree(folder, ignore_errors=True)  # of an export that was killed
    folder.mkdir(parents=True)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def write_float32(source: Source, config: ExportConfig, folder: Path) -> OnnxDescription:
    """A whole folder, not yet compared."""
    model = source.model
    model.config.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    source.write_files(folder)
    made_from = {"model": name_of(config.model), "class": type(model.model).__name__}
    description = source.describe(
        pad_token_id=model.tokenizer.pad_token_id,
        inputs=(),
        precision="float32",
        source=made_from | {"versions": {name: version(name) for name in LIBRARIES}},
        verification={},
    )
    description = replace(description, inputs=description.expected_inputs)
    write_graph(source.graph(), description.inputs, folder / MODEL_FILE)
    write_description(folder, description)
    return description


def quantize_folder(
    config: ExportConfig,
    source: Source,
    check: CheckData,
    expected: Computed,
    folder: Path,
    description: OnnxDescription,
) -> tuple[OnnxDescription, Verification, Int8]:
    """Replace the float32 graph. Returns the new description, what was measured, and how it was made."""
    float32 = folder / "float32"
    float32.mkdir()
    for file in folder.glob(f"{MODEL_FILE}*"):
        os.rename(file, float32 / file.name)
    layers = layers_of(onnx.load(float32 / MODEL_FILE, load_external_data=False), source.heads)
    excluded = layers.matching(config.exclude_layers or []) if config.exclude_layers != ["auto"] else []
    ranges = calibrated(config, source, layers, float32 / MODEL_FILE, description.inputs)
    description = replace(description, precision="int8")
    write_description(folder, description)

    def open_with(excluded: Collection[str]) -> Compute:
        nodes = layers.nodes_without(excluded)
        quantize_int8(float32 / MODEL_FILE, folder / MODEL_FILE, nodes, ranges, config.per_channel)
        return source.open_exported(folder)

    def verified(excluded: Collection[str]) -> Verification:
        return check.compare(expected, check.computed(open_with(excluded)))

    costs: list[LayerCost] = []
    if config.exclude_layers == ["auto"]:
        costs = layer_costs(list(layers.nodes), verified)
        names = [cost.name for cost in costs]
        excluded = fewest_to_exclude(names, lambda some: not verified(some).problems())
    verification = verified(excluded)
    shutil.rmtree(float32)
    static = config.calibrate_with is not None
    with_what = (Path(config.calibrate_with).name, config.calibration_method) if static else (None, None)
    return description, verification, Int8(excluded, costs, *with_what)


def calibrated(
    config: ExportConfig, source: Source, layers: Layers, file: Path, inputs: Sequence[str]
) -> Mapping[str, Range] | None:
    """Ranges of what goes into products; None for dynamic int8."""
    if config.calibrate_with is None:
        return None
    texts = calibration_texts(config, source)
    activations = list(dict.fromkeys(layers.inputs.values()))
    return activation_ranges(
        file, activations, texts, inputs, config.calibration_method, config.calibration_percentile
    )


def megabytes(folder: Path) -> float:
    """Of the graph and its weights."""
    return sum(file.stat().st_size for file in folder.glob(f"{MODEL_FILE}*")) / 1e6
