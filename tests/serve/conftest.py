"""Backends over tiny models, read only."""

import pytest

from rag_retrieval.infer.backend import open_backend
from rag_retrieval.models.embedder import EmbeddingModel
from rag_retrieval.models.options import ModelOptions


@pytest.fixture(scope="session")
def backend(model_folders):
    return open_backend(model_folders["bert"], ModelOptions(max_length=64, device="cpu"))


@pytest.fixture(scope="session")
def token_vector_backend(base_folders, tmp_path_factory):
    """Of a ColBERT: documents of 64 tokens, queries of 32 with the mask tokens that expand them."""
    folder = tmp_path_factory.mktemp("token_vectors") / "colbert"
    model = EmbeddingModel.from_pretrained(base_folders["bert"], representations=["multi_vector"], max_length=64)
    model.save_pretrained(folder)
    return open_backend(folder, ModelOptions(device="cpu"))
