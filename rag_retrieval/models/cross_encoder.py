"""`CrossEncoder`: BERT, RoBERTa, XLM-RoBERTa, ELECTRA, DeBERTa, ModernBERT and relatives as rerankers.

The pair is laid out as the family's own tokenizer does it (`[CLS] query [SEP] document [SEP]`), the score is
the one logit of its sequence-classification head.
"""

import inspect
import os
from dataclasses import replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rag_retrieval.models.calibration import read_calibration
from rag_retrieval.models.model_files import RerankerSettings, read_settings, resolve_model_path
from rag_retrieval.models.model_loading import (
    choose_max_length,
    is_decoder,
    load_classifier,
    load_tokenizer,
    warn_of_new_parameters,
)
from rag_retrieval.models.packed_model import ENCODER_HEADS, Head
from rag_retrieval.models.pad_token import set_encoder_pad_token
from rag_retrieval.models.pair_encoding import PairEncoder, PairTemplate, encoder_template
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.sentence_transformers_files import write_encoder_files


class CrossEncoder(PairScorer):
    """An encoder that reads query and document together. Build it with `from_pretrained`."""

    model_type = "bert_encoder"
    causal = False

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | os.PathLike,
        num_labels: int = 1,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
    ) -> "CrossEncoder":
        """Load a base model (with a fresh head, and a warning) or a trained reranker.

        model_name_or_path: a folder, a hub name, or `package:NAME` for a model inside a Python package.
        max_length: tokens per pair; default what the folder was saved with, else 512 or the model's limit.
        dtype: of the weights; default float32. Raises ValueError for num_labels other than 1, for a causal
        model, and for a max_length beyond the model's positions.
        """
        path = resolve_model_path(model_name_or_path)
        saved = read_settings(path)
        if saved is not None and saved.model_type != cls.model_type:
            raise ValueError(
                f"{path} was saved as {saved.model_type}; load it with LLMDecoder.from_pretrained"
            )
        model, new_parameters = load_classifier(
            path,
            num_labels=num_labels,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
        if is_decoder(model):
            name = type(model).__name__
            raise ValueError(f"{path} is a {name}, a decoder; use LLMDecoder (model_type: llm_decoder)")
        warn_of_new_parameters(path, new_parameters)
        tokenizer = load_tokenizer(path, trust_remote_code)
        set_encoder_pad_token(model, tokenizer)
        max_length = choose_max_length(max_length, saved and saved.max_len, model)
        tokenizer.model_max_length = max_length  # other libraries truncate by it
        encoder = PairEncoder(tokenizer, template_for(model, tokenizer), max_length)
        settings = RerankerSettings(cls.model_type, max_length)
        scorer = cls(model, encoder, settings, new_parameters, attn_implementation)
        scorer.calibration = read_calibration(path)
        return scorer

    @property
    def packed_head(self) -> Head | None:
        return ENCODER_HEADS.get(self.config.model_type)

    def scores_of(self, inputs: dict[str, torch.Tensor], lengths: torch.Tensor) -> torch.Tensor:
        return self.model(**inputs).logits.squeeze(-1).float()

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As of every scorer, and the file by which servers cut pairs at the same length."""
        super().save_pretrained(folder, state_dict)
        write_encoder_files(Path(folder), self.settings)


def template_for(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> PairTemplate:
    """The tokenizer's pair layout, without segment ids where the model has no embedding for them."""
    template = encoder_template(tokenizer)
    if template.types is None:
        return template
    segments = getattr(model.config, "type_vocab_size", 0)
    if segments >= 2 and "token_type_ids" in inspect.signature(model.forward).parameters:
        return template
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    # save_pretrained writes only the attributes that init_kwargs names
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    return replace(template, types=None)
