"""Settings of the whole test session, made before torch or transformers are imported by a test module."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def record_cache_of_this_session():
    """Converted data files go to a folder of this session, never to the user's own cache."""
    with tempfile.TemporaryDirectory(prefix="rag-retrieval-tests-") as folder:
        os.environ["RAG_RETRIEVAL_CACHE"] = folder
        yield
