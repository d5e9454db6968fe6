"""Backends over tiny models, read only."""

import pytest
import torch
from tiny_models import CHINESE, ENGLISH

from rag_retrieval.infer.backend import open_backend
from rag_retrieval.infer.embedder import Embedder
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


@pytest.fixture(scope="session")
def embedders(base_folders, tmp_path_factory) -> dict[str, Embedder]:
    """Of 64 tokens. dense, calibrated, unified: with prompts; the last two with ranges for int8, the third with all
    representations. colbert: token vectors, with queries that are filled up. splade: lexical weights alone."""
    root, prompts = tmp_path_factory.mktemp("embedders"), {"query": "query: ", "clustering": "Topic: "}
    options = {
        "dense": {"prompts": prompts},
        "calibrated": {"prompts": prompts},
        "unified": {"prompts": prompts, "representations": ["dense", "lexical", "multi_vector"]},
        "colbert": {"representations": ["multi_vector"], "colbert_dim": 16},
        "splade": {"representations": ["lexical"], "lexical": "splade"},
    }
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)  # of new heads
        for name, own in options.items():
            EmbeddingModel.from_pretrained(base_folders["bert"], max_length=64, **own).save_pretrained(root / name)
    state = torch.load(root / "unified" / "sparse_linear.pt")
    torch.save(state | {"bias": state["bias"] + 1}, root / "unified" / "sparse_linear.pt")  # else most weights were 0
    found = {name: Embedder(root / name, device="cpu") for name in options}
    for name in ("calibrated", "unified"):
        found[name].calibrate([*ENGLISH, *CHINESE])
    return found
