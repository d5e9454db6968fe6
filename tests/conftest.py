"""Settings of the whole test session, made before torch or transformers are imported by a test module."""

import logging
import math
import os
import sys
import tempfile

# what a shell, a cluster or a service may have set: ranks of a group, how text is shown, a proxy before 127.0.0.1, keys
# of ours; processes that tests start would have it too
FOREIGN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "COLUMNS", "LINES",
           "FORCE_COLOR", "NO_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE", "HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY",
           "RAG_RETRIEVAL_SERVE_TOKEN", "RAG_RETRIEVAL_TRACEBACK"}  # fmt: skip
for name in [*os.environ]:
    if name.upper() in FOREIGN or name.startswith(("ACCELERATE_", "FSDP_", "WANDB_")):
        del os.environ[name]
# of this process and of those that tests start: threads of tiny models only wait for each other
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HAYSTACK_TELEMETRY_ENABLED"] = "false"  # it would reach for the network

import pytest  # noqa: E402


@pytest.fixture(scope="session", autouse=True)
def record_cache_of_this_session():
    """Converted data files go to a folder of this session, never to the user's own cache."""
    with tempfile.TemporaryDirectory(prefix="rag-retrieval-tests-") as folder:
        os.environ["RAG_RETRIEVAL_CACHE"] = folder
        yield


@pytest.fixture(autouse=True)
def fresh_accelerator():
    """Accelerate keeps its state for the whole process; each run needs its own, of us and of other trainers."""
    yield
    if state := sys.modules.get("accelerate.state"):
        state.AcceleratorState._reset_state(True)


@pytest.fixture(autouse=True)
def default_log(monkeypatch):
    """A command sets the level for its process, which must not reach the next test. On a slow machine, too, long work
    logs no line of progress unless a test asks for it."""
    logging.getLogger("rag_retrieval").setLevel(logging.NOTSET)
    monkeypatch.setattr("rag_retrieval.core.log.LOG_EVERY", math.inf)


@pytest.fixture(scope="session")
def browser():
    """One for all tests. Where it is not asked for they are skipped; where it is asked for and missing they fail."""
    if os.environ.get("RAG_RETRIEVAL_TEST_BROWSER") != "1":
        pytest.skip("needs Chromium: set RAG_RETRIEVAL_TEST_BROWSER=1")
    from browser_samples import opened_browser

    with opened_browser() as opened:
        yield opened


@pytest.fixture(scope="session")
def model_folders(tmp_path_factory) -> dict[str, str]:
    """Tiny folders with a score head, by family. Read only: a test that writes makes its own."""
    import tiny_models

    root = tmp_path_factory.mktemp("models")
    return {
        "bert": tiny_models.tiny_bert(root / "bert", head_labels=1),
        "xlm_roberta": tiny_models.tiny_xlm_roberta(root / "xlm_roberta", head_labels=1),
        "qwen2": tiny_models.tiny_qwen2(root / "qwen2", head_labels=1),
        "llama": tiny_models.tiny_llama(root / "llama", head_labels=1),
    }


@pytest.fixture(scope="session")
def base_folders(tmp_path_factory) -> dict[str, str]:
    """Tiny folders without a head, by family. Read only."""
    from embedder_samples import FAMILIES

    return {name: make(tmp_path_factory.mktemp(name)) for name, make in FAMILIES.items()}


@pytest.fixture(scope="session")
def load_tiny(model_folders):
    """`load_tiny("bert")`: a fresh scorer of one of the four tiny families; options go to from_pretrained."""
    from rag_retrieval import CrossEncoder, LLMDecoder

    classes = {"bert": CrossEncoder, "xlm_roberta": CrossEncoder, "qwen2": LLMDecoder, "llama": LLMDecoder}
    return lambda family, **options: classes[family].from_pretrained(model_folders[family], **options)
