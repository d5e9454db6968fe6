"""Backends over tiny models, read only."""

import pytest

from rag_retrieval.infer.backend import BackendOptions, open_backend


@pytest.fixture(scope="session")
def backend(model_folders):
    return open_backend(model_folders["bert"], BackendOptions(max_length=64, device="cpu"))
