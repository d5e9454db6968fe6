"""Tiny models in ONNX for tests, and an encoder of their pairs without torch."""

from pathlib import Path

from rag_retrieval.export.export_config import ExportConfig
from rag_retrieval.export.run import export_reranker


def exported(model: str | Path, output: Path, **options) -> Path:
    """The folder of the exported model; options as of ExportConfig."""
    return export_reranker(ExportConfig(model=str(model), output=str(output), **options)).folder
