"""Backends over tiny models, read only."""

import pytest

from rag_retrieval.infer.backend import open_backend
from rag_retrieval.models.options import ModelOptions


@pytest.fixture(scope="session")
def backend(model_folders):
    return open_backend(model_folders["bert"], ModelOptions(max_length=64, device="cpu"))
