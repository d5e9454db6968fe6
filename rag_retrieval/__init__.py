"""Train, measure and run the models of a retrieval system: embedders find documents, rerankers put them in order.

The public names are loaded on first use, so that `import rag_retrieval` costs nothing and a wrong
configuration is reported before torch is imported.
"""

import importlib

__version__ = "0.1.0"

_PUBLIC = {
    "ColBERT": "rag_retrieval.infer.rag_retrieval_classes",
    "CrossEncoder": "rag_retrieval.models.cross_encoder",
    "Embedder": "rag_retrieval.infer.embedder",
    "Embedding": "rag_retrieval.infer.rag_retrieval_classes",
    "ExportConfig": "rag_retrieval.export.config",
    "EvaluationConfig": "rag_retrieval.evaluate.config",
    "RetrievalEvaluationConfig": "rag_retrieval.evaluate.retrieval_config",
    "Index": "rag_retrieval.retrieval.index",
    "IndexOptions": "rag_retrieval.retrieval.config",
    "LLMDecoder": "rag_retrieval.models.llm_decoder",
    "ListwiseReranker": "rag_retrieval.infer.listwise",
    "build_index": "rag_retrieval.retrieval.index",
    "export_model": "rag_retrieval.export.run",
    "evaluate_reranker": "rag_retrieval.evaluate.evaluation",
    "evaluate_retriever": "rag_retrieval.evaluate.retrieval",
    "load_reranker": "rag_retrieval.models.open",
    "ModelOptions": "rag_retrieval.models.options",
    "MiningConfig": "rag_retrieval.mining.config",
    "Reranker": "rag_retrieval.infer.reranker",
    "Retriever": "rag_retrieval.retrieval.retriever",
    "mine": "rag_retrieval.mining.run",
    "push_to_hub": "rag_retrieval.export.hub",
    "score_over_processes": "rag_retrieval.models.process_scoring",
}
__all__ = [*_PUBLIC, "__version__"]


def __getattr__(name: str):
    if name not in _PUBLIC:
        raise AttributeError(f"module 'rag_retrieval' has no attribute {name!r}; it has {', '.join(_PUBLIC)}")
    return getattr(importlib.import_module(_PUBLIC[name]), name)


def __dir__() -> list[str]:
    return __all__
