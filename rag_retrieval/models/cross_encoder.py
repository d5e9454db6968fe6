"""`CrossEncoder`: BERT, RoBERTa, XLM-RoBERTa, ELECTRA, DeBERTa, ModernBERT and relatives as rerankers.

The pair is laid out as the family's own tokenizer does it (`[CLS] query [SEP] document [SEP]`), the score is
the one logit of its sequence-classification head.
"""

import logging

import torch

from rag_retrieval.models.model_files import RerankerSettings, choose_setting, read_settings, resolve_model_path
from rag_retrieval.models.pair_batch import PairBatch, padded_inputs
from rag_retrieval.models.pair_encoding import PairEncoder, encoder_template
from rag_retrieval.models.pair_scorer import (
    PairScorer,
    check_max_length,
    is_decoder,
    load_classifier,
    load_tokenizer,
    position_limit,
)

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 512


class CrossEncoder(PairScorer):
    """An encoder that reads query and document together. Build it with `from_pretrained`."""

    model_type = "bert_encoder"

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        num_labels: int = 1,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
    ) -> "CrossEncoder":
        """Load a base model (with a fresh head, logged) or a trained reranker.

        model_name_or_path: a folder, a hub name, or `package:NAME` for a model inside a Python package.
        max_length: tokens per pair; default what the folder was saved with, else 512 or the model's limit.
        dtype: of the weights; default float32. Raises ValueError for num_labels other than 1, for a causal
        model, and for a max_length beyond the model's positions.
        """
        path = resolve_model_path(model_name_or_path)
        saved = read_settings(path)
        if saved is not None and saved.model_type != cls.model_type:
            raise ValueError(f"{path} was saved as {saved.model_type}; load it with LLMDecoder.from_pretrained")
        model, new_parameters = load_classifier(
            path,
            num_labels=num_labels,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
        if is_decoder(model):
            raise ValueError(f"{path} is a {type(model).__name__}, a decoder; use LLMDecoder (model_type: llm_decoder)")
        if new_parameters:
            logger.info("%s has no %s: newly initialised, train before use", path, ", ".join(sorted(new_parameters)))
        tokenizer = load_tokenizer(path, trust_remote_code)
        default = min(DEFAULT_MAX_LENGTH, position_limit(model) or DEFAULT_MAX_LENGTH)
        max_length = choose_setting("max_length", max_length, saved and saved.max_len, default)
        check_max_length(max_length, model)
        tokenizer.model_max_length = max_length  # other libraries truncate by it
        settings = RerankerSettings(cls.model_type, max_length)
        return cls(model, PairEncoder(tokenizer, encoder_template(tokenizer), max_length), settings, new_parameters)

    def forward(self, batch: PairBatch) -> torch.Tensor:
        inputs = padded_inputs(batch, self.tokenizer.pad_token_id)
        return self.model(**inputs).logits.squeeze(-1).float()
