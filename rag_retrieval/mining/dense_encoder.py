"""Vectors of texts from a bi-encoder: a sentence-transformers folder, or a plain encoder with mean or cls pooling.

The trap: a sentence-transformers folder says itself how it pools, and which prompts go before queries and
documents; a plain folder says neither, and with the wrong pooling or without its prefix ("query: " for E5) a
model still gives vectors, only worse ones.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import cached_file

from rag_retrieval.mining.mining_config import MiningConfig
from rag_retrieval.models.loading import choose_max_length, load_tokenizer, reading
from rag_retrieval.models.settings import resolve_model_path

Encode = Callable[[list[str]], np.ndarray]  # texts to float32 [texts, width]


@dataclass(frozen=True)
class DenseEncoder:
    queries: Encode
    documents: Encode


def load_encoder(config: MiningConfig, device: str) -> DenseEncoder:
    """Raises ValueError where the folder is no model, or a reranker's, or pooling is given for one that has its own."""
    path = resolve_model_path(config.dense_model)
    modules = cached_file(
        path,
        "modules.json",
        _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
        _raise_exceptions_for_gated_repo=False,
    )
    if modules is None:
        return _plain_encoder(path, config, device)
    if config.pooling is not None:
        raise ValueError(f"{path}: pooling is given, but this sentence-transformers folder has its own; remove it")
    return _sentence_transformer(path, config, device)


def _sentence_transformer(path: str, config: MiningConfig, device: str) -> DenseEncoder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(f"{path} is a sentence-transformers folder; run: pip install sentence-transformers") from None
    with reading(f"{path}: the dense model"):
        model = SentenceTransformer(path, device=device)
    if config.dense_max_len is not None:
        model.max_seq_length = config.dense_max_len
    options = {
        "batch_size": config.dense_batch_size,
        "normalize_embeddings": config.similarity == "cosine",
        "show_progress_bar": False,
    }
    return DenseEncoder(
        lambda texts: model.encode_query(texts, prompt=config.query_prefix, **options),
        lambda texts: model.encode_document(texts, prompt=config.document_prefix, **options),
    )


def _plain_encoder(path: str, config: MiningConfig, device: str) -> DenseEncoder:
    tokenizer = load_tokenizer(path, trust_remote_code=False)
    with reading(f"{path}: the dense model"):
        saved = AutoConfig.from_pretrained(path)
    refuse_reranker(path, saved)
    with reading(f"{path}: the dense model"):
        model = AutoModel.from_pretrained(path).eval().to(device)
    max_len = choose_max_length(config.dense_max_len, None, model)

    def encode(texts: list[str], prefix: str | None) -> np.ndarray:
        vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        for start in range(0, len(order), config.dense_batch_size):
            places = order[start : start + config.dense_batch_size]
            batch = [(prefix or "") + texts[place] for place in places]
            vectors[places] = pooled_vectors(model, tokenizer, batch, max_len, config.pooling or "mean")
        return unit_vectors(vectors) if config.similarity == "cosine" else vectors

    return DenseEncoder(
        lambda texts: encode(texts, config.query_prefix),
        lambda texts: encode(texts, config.document_prefix),
    )


def refuse_reranker(path: str, config: PreTrainedConfig) -> None:
    """Raises ValueError for a model with a score head: its token vectors tell of a pair, not of a text."""
    for name in config.architectures or ():
        if name.endswith("ForSequenceClassification"):
            raise ValueError(f"{path} is a reranker ({name}); give a bi-encoder, or name it under reranker")


@torch.inference_mode()
def pooled_vectors(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, texts: list[str], max_len: int, pooling: str
) -> np.ndarray:
    """float32 [texts, width]: the mean of the last layer's token vectors, or the vector of the first token."""
    inputs = tokenizer(
        texts, padding=True, padding_side="right", truncation=True, max_length=max_len, return_tensors="pt"
    ).to(model.device)
    hidden = model(**inputs).last_hidden_state.float()
    if pooling == "cls":
        return hidden[:, 0].cpu().numpy()
    mask = inputs["attention_mask"][..., None].float()
    return ((hidden * mask).sum(1) / mask.sum(1)).cpu().numpy()


def unit_vectors(vectors: np.ndarray) -> np.ndarray:
    """Of length 1; a vector of zeros stays one."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
