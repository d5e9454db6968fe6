"""Tiny models in ONNX for tests. Tracing one takes seconds, so equal models of a test session are traced once."""

import hashlib
from pathlib import Path
from unittest import mock

import torch

from rag_retrieval.export import run
from rag_retrieval.export.config import ExportConfig
from rag_retrieval.export.onnx_graph import write_graph

_GRAPHS: dict[str, bytes] = {}


def exported(model: str | Path, output: Path, **options) -> Path:
    """The folder of the exported model; options as of ExportConfig."""
    with mock.patch.object(run, "write_graph", write_graph_once):
        return run.export_model(ExportConfig(model=str(model), output=str(output), **options)).folder


def write_graph_once(graph, inputs, file: Path) -> None:
    key = key_of(graph.model)
    if key not in _GRAPHS:
        write_graph(graph, inputs, file)
        _GRAPHS[key] = file.read_bytes()
    file.write_bytes(_GRAPHS[key])


def key_of(model) -> str:
    digest = hashlib.sha256(f"{model.settings} {model.config.model_type}".encode())
    for name, value in model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
