"""`export_model`: a reranker or embedder as ONNX, in float32 or int8, compared with it before the folder is kept.

Everything is written beside the output folder and renamed at the end. An export that fails, or that does not compute
what its model computes, leaves nothing behind.
"""

import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np

from rag_retrieval.core.files import lock_file_of, locked
from rag_retrieval.core.log import Progress
from rag_retrieval.evaluate.systems import name_of
from rag_retrieval.export.config import ExportConfig
from rag_retrieval.export.onnx_graph import write_graph
from rag_retrieval.export.quantize import quantize_int8
from rag_retrieval.export.source import Source, open_source
from rag_retrieval.export.verify import CheckData, Computed, Verification, check_float32, check_int8, read_check_data
from rag_retrieval.infer.onnx_folder import MODEL_FILE, OnnxDescription, write_description

LIBRARIES = ("rag-retrieval", "torch", "transformers", "onnx", "onnxruntime")


@dataclass(frozen=True)
class Exported:
    """folder: what was written. problems: what is beyond the limits of int8 and was kept by `force`."""

    folder: Path
    verification: Verification
    problems: list[str]

    def describe(self) -> str:
        lines = [f"{self.folder}: {megabytes(self.folder):.1f} MB", f"  {self.verification.describe()}"]
        return "\n".join([*lines, *(f"  kept by --force although {problem}" for problem in self.problems)])


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
        if config.quantize:
            description = quantize_folder(folder, description, source.heads)
            exported = check.computed(source.open_exported(folder))
        verification = check.compare(expected, exported)
        problems = check_int8(verification, config.force) if config.quantize else []
        measured = asdict(verification) | {"kept_by_force": problems}
        write_description(folder, replace(description, verification=measured))
        os.rename(folder, output)
    return Exported(output, verification, problems)


def check_output(folder: Path) -> None:
    """Raises ValueError for a file and for a folder that is not empty."""
    if folder.is_file():
        raise ValueError(f"output: {folder} is a file; name a new folder")
    if folder.is_dir() and any(folder.iterdir()):
        raise ValueError(f"output: {folder} holds files; name a new folder, or empty it first")


def own_results(model: str, source: Source, check: CheckData) -> Computed:
    """Raises ValueError for scores that are not finite."""
    with Progress(len(check.encoded), "computing with the model", "texts") as progress:
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


def quantize_folder(folder: Path, description: OnnxDescription, heads: Sequence[str]) -> OnnxDescription:
    """Replace the float32 graph. heads: as of `quantize_int8`."""
    float32 = folder / "float32"
    float32.mkdir()
    for file in folder.glob(f"{MODEL_FILE}*"):
        os.rename(file, float32 / file.name)
    quantize_int8(float32 / MODEL_FILE, folder / MODEL_FILE, heads)
    shutil.rmtree(float32)
    description = replace(description, precision="int8")
    write_description(folder, description)
    return description


def megabytes(folder: Path) -> float:
    """Of the graph and its weights."""
    return sum(file.stat().st_size for file in folder.glob(f"{MODEL_FILE}*")) / 1e6
