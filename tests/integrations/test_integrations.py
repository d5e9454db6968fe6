"""Adapters: nothing of a library is imported before it is used, a missing one is named with its extra, and a model
without dense vectors is refused."""

import subprocess
import sys

import pytest

from rag_retrieval import Embedder
from rag_retrieval.integrations import open_dense_embedder
from rag_retrieval.models.embedder import EmbeddingModel

ADAPTERS = {
    "langchain": ("langchain_core", "langchain-core", "langchain"),
    "llama_index": ("llama_index", "llama-index-core", "llama-index"),
    "haystack": ("haystack", "haystack-ai", "haystack"),
    "mteb": ("mteb", "mteb", "mteb"),
}


def test_the_reranker_imports_none_of_the_libraries():
    code = "import sys, rag_retrieval.infer.reranker, rag_retrieval.integrations; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not {library for library, _, _ in ADAPTERS.values()} & set(done.stdout.split())


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_missing_library_is_named_with_the_command_that_brings_it(name, monkeypatch):
    library, package, extra = ADAPTERS[name]
    for module in [*sys.modules]:
        if module == library or module.startswith(f"{library}."):
            monkeypatch.delitem(sys.modules, module)
    monkeypatch.delitem(sys.modules, f"rag_retrieval.integrations.{name}", raising=False)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(ImportError) as problem:
        __import__(f"rag_retrieval.integrations.{name}")
    assert str(problem.value) == f"this adapter needs {package}; run: pip install -e '.[{extra}]'"


def test_a_model_without_dense_vectors_is_refused_before_anything_is_encoded(base_folders, tmp_path):
    model = EmbeddingModel.from_pretrained(base_folders["bert"], representations=["lexical"], lexical="splade")
    model.save_pretrained(tmp_path)
    for given in (str(tmp_path), Embedder(tmp_path)):
        with pytest.raises(ValueError, match="gives lexical and no dense vectors"):
            open_dense_embedder(given, None)
