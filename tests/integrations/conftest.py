"""Models that find right answers, opened once for all frameworks."""

import pytest
from integration_samples import MINILM, PROMPTS, bilingual_index, token_vector_model

from rag_retrieval import Embedder, Index, Reranker


@pytest.fixture(scope="session")
def embedder() -> Embedder:
    return Embedder(MINILM, prompts=PROMPTS)


@pytest.fixture(scope="session")
def token_folder(tmp_path_factory) -> str:
    return token_vector_model(tmp_path_factory.mktemp("tokens") / "model")


@pytest.fixture(scope="session")
def token_reranker(token_folder) -> Reranker:
    return Reranker(token_folder)


@pytest.fixture(scope="session")
def index(tmp_path_factory) -> Index:
    return bilingual_index(tmp_path_factory.mktemp("search") / "index")
