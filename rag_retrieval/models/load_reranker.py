"""A reranker of either kind from its folder: the folder says which.

What a reader would get wrong: only folders saved by this library say so in `reranker_config.json`. For others
the class that transformers would load decides, built without weights to look at it.
"""

import os

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification

from rag_retrieval.models.cross_encoder import CrossEncoder
from rag_retrieval.models.llm_decoder import LLMDecoder
from rag_retrieval.models.model_files import read_settings, resolve_model_path
from rag_retrieval.models.model_loading import is_decoder, reading
from rag_retrieval.models.pair_scorer import PairScorer

CLASSES = {kind.model_type: kind for kind in (CrossEncoder, LLMDecoder)}


def load_reranker(model_name_or_path: str | os.PathLike, max_length: int | None = None) -> PairScorer:
    """The `CrossEncoder` or `LLMDecoder` in a folder, a hub name or `package:NAME`, with float32 weights.

    max_length: tokens per pair; None means what was saved with the model. Raises ValueError as `from_pretrained`.
    """
    path = resolve_model_path(model_name_or_path)
    return CLASSES[model_type_of(path)].from_pretrained(path, max_length=max_length)


def check_trained(name: str, scorer: PairScorer) -> None:
    """Raises ValueError for a scorer whose head no checkpoint gave: its scores are random."""
    if scorer.new_parameters:
        raise ValueError(f"{name}: found a model without a trained score head; give a trained reranker")


def model_type_of(path: str, trust_remote_code: bool = False) -> str:
    saved = read_settings(path)
    if saved is not None:
        return saved.model_type
    with reading(f"{path}: the model"), torch.device("meta"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    return LLMDecoder.model_type if is_decoder(model) else CrossEncoder.model_type
