"""Vectors of texts from a bi-encoder: a sentence-transformers folder, or a plain encoder with mean or cls pooling.

A sentence-transformers folder says itself how it pools, and which prompts go before queries and documents. A plain
folder says neither: with the wrong pooling, or without its prefix ("query: " for E5), a model gives vectors all the
same, only worse ones.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoConfig, AutoModel, PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from rag_retrieval.models.loading import DEFAULT_MAX_LENGTH, check_max_length, load_tokenizer, position_limit, reading
from rag_retrieval.models.settings import find_file, resolve_model_path

Encode = Callable[[list[str]], np.ndarray]  # texts to float32 [texts, width]


@dataclass(frozen=True)
class EncoderOptions:
    """model: a sentence-transformers folder, a plain encoder's, a hub name, or package:NAME. pooling: of a plain
    encoder (None: mean). query_prefix, document_prefix: None leaves the model its own prompts. max_len: tokens of a
    text (None: the model's own). batch_size: texts in a forward. similarity: cosine makes vectors of length 1.
    trust_remote_code: whether Python code that comes with the model is run.
    """

    model: str
    pooling: Literal["mean", "cls"] | None = None
    query_prefix: str | None = None
    document_prefix: str | None = None
    max_len: int | None = None
    batch_size: int = 32
    similarity: Literal["cosine", "dot"] = "cosine"
    trust_remote_code: bool = False


@dataclass(frozen=True)
class DenseEncoder:
    queries: Encode
    documents: Encode


def load_encoder(options: EncoderOptions, device: str) -> DenseEncoder:
    """Raises ValueError where the folder is no model, or a reranker's, where pooling is given for one that has its own,
    and where the hub cannot be asked whether the model has its own."""
    path = resolve_model_path(options.model)
    if find_file(path, "modules.json") is None:
        return _plain_encoder(path, options, device)
    if options.pooling is not None:
        raise ValueError(f"{path}: pooling is given, but this sentence-transformers folder has its own; remove it")
    return _sentence_transformer(path, options, device)


def _sentence_transformer(path: str, options: EncoderOptions, device: str) -> DenseEncoder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ValueError(f"{path} is a sentence-transformers folder; run: pip install sentence-transformers") from None
    with reading(f"{path}: the dense model"):
        model = SentenceTransformer(path, device=device, trust_remote_code=options.trust_remote_code)
    if options.max_len is not None:
        model.max_seq_length = options.max_len
    arguments = {
        "batch_size": options.batch_size,
        "normalize_embeddings": options.similarity == "cosine",
        "show_progress_bar": False,
    }
    return DenseEncoder(
        lambda texts: model.encode_query(texts, prompt=options.query_prefix, **arguments),
        lambda texts: model.encode_document(texts, prompt=options.document_prefix, **arguments),
    )


def _plain_encoder(path: str, options: EncoderOptions, device: str) -> DenseEncoder:
    tokenizer = load_tokenizer(path, options.trust_remote_code)
    with reading(f"{path}: the dense model"):
        saved = AutoConfig.from_pretrained(path, trust_remote_code=options.trust_remote_code)
    refuse_reranker(path, saved)
    with reading(f"{path}: the dense model"):
        model = AutoModel.from_pretrained(path, trust_remote_code=options.trust_remote_code).eval().to(device)
    limit = position_limit(model) or DEFAULT_MAX_LENGTH
    max_len = min(DEFAULT_MAX_LENGTH, limit) if options.max_len is None else options.max_len
    check_max_length(max_len, model)

    def encode(texts: list[str], prefix: str | None) -> np.ndarray:
        vectors = np.zeros((len(texts), model.config.hidden_size), np.float32)
        order = sorted(range(len(texts)), key=lambda place: -len(texts[place]))
        for start in range(0, len(order), options.batch_size):
            places = order[start : start + options.batch_size]
            batch = [(prefix or "") + texts[place] for place in places]
            vectors[places] = pooled_vectors(model, tokenizer, batch, max_len, options.pooling or "mean")
        if options.similarity == "cosine":
            vectors /= np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)  # one of zeros stays
        return vectors

    return DenseEncoder(
        lambda texts: encode(texts, options.query_prefix), lambda texts: encode(texts, options.document_prefix)
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
    """The mean of the last layer's token vectors, or the vector of the first token: float32 [texts, width].

    A text without a token (an empty one, where the tokenizer adds none) has a vector of zeros.
    """
    # not padded by the tokenizer: that of a decoder may have no pad token, and the mask hides whatever is there
    ids = [torch.tensor(of_text) for of_text in tokenizer(texts, truncation=True, max_length=max_len)["input_ids"]]
    lengths = torch.tensor([len(of_text) for of_text in ids])
    if not lengths.any():
        return np.zeros((len(texts), model.config.hidden_size), np.float32)
    input_ids = pad_sequence([of_text.long() for of_text in ids], True, tokenizer.pad_token_id or 0).to(model.device)
    mask = (torch.arange(input_ids.shape[1]) < lengths[:, None]).to(model.device)
    hidden = model(input_ids=input_ids, attention_mask=mask.long()).last_hidden_state.float()
    if pooling == "cls":
        vectors = hidden[:, 0] * mask[:, :1]
    else:
        vectors = (hidden * mask[..., None]).sum(1) / mask.sum(1, keepdim=True).clamp(min=1)
    return vectors.cpu().numpy()
