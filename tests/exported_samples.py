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
        return run.export_reranker(ExportConfig(model=str(model), output=str(output), **options)).folder


def write_graph_once(scorer, file: Path) -> None:
    key = key_of(scorer)
    if key not in _GRAPHS:
        write_graph(scorer, file)
        _GRAPHS[key] = file.read_bytes()
    file.write_bytes(_GRAPHS[key])


def key_of(scorer) -> str:
    digest = hashlib.sha256(f"{scorer.settings.head} {scorer.config.model_type}".encode())
    for name, value in scorer.model.state_dict().items():
        digest.update(name.encode())
        digest.update(value.contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
