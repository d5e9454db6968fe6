"""`CrossEncoder`: BERT, RoBERTa, XLM-RoBERTa, ELECTRA, DeBERTa, ModernBERT and relatives as rerankers.

The pair is laid out as the family's own tokenizer does it (`[CLS] query [SEP] document [SEP]`), each text within its
format, and the score is the one logit of the family's sequence-classification head.
"""

import inspect
import logging
import os
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rag_retrieval.models.calibration import read_calibration
from rag_retrieval.models.devices import choose_dtype
from rag_retrieval.models.loading import (
    check_is_trained,
    check_num_labels,
    check_vocabulary,
    choose_max_length,
    is_decoder,
    load_classifier,
    load_tokenizer,
    lower_case_like,
    set_encoder_pad_token,
    truncates_left,
    warn_of_new_parameters,
)
from rag_retrieval.models.options import ModelOptions, options_among
from rag_retrieval.models.packed_model import ENCODER_HEADS, Head
from rag_retrieval.models.pair_encoding import (
    PairEncoder,
    PairTemplate,
    bare,
    encoder_template,
    split_format,
    tokenize,
)
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.sentence_transformers_files import write_encoder_files
from rag_retrieval.models.settings import (
    TEXT_FORMATS,
    YES_NO_NAMES,
    ModelFiles,
    RerankerSettings,
    choose_setting,
    read_settings,
    resolve_model_path,
)

logger = logging.getLogger(__name__)

NO_FORMAT = "{}"


class CrossEncoder(PairScorer):
    """An encoder that reads query and document together. Build it with `from_pretrained`."""

    model_type = "bert_encoder"
    causal = False

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | os.PathLike,
        loss_type: str | None = None,
        num_labels: int = 1,
        query_format: str | None = None,
        document_format: str | None = None,
        *,
        split_special_tokens: bool | None = None,
        max_length: int | None = None,
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
    ) -> "CrossEncoder":
        """Load a base model (with a fresh head, and a warning) or a trained reranker.

        model_name_or_path: a folder, a hub name, or `package:NAME` for a model inside a Python package.
        loss_type: ignored; RAG-Retrieval's classes take it here.
        query_format, document_format: text around a query and a document, which stand for `{}`; default what the
        folder says, else "{}". split_special_tokens: whether special tokens inside a text, such as [SEP], are plain
        text; default as the tokenizer's files say, else not, as in transformers. max_length: tokens per pair; default
        what the folder says, else 512 or the model's limit. dtype: of the weights; default float32.

        Raises ValueError for num_labels other than 1, a causal model, a format without exactly one `{}`, and a
        max_length beyond the model's positions.
        """
        options = options_among(locals())
        check_num_labels(num_labels)
        return cls.load(ModelFiles(resolve_model_path(model_name_or_path)), options)

    @classmethod
    def load(cls, files: ModelFiles, options: ModelOptions, trained_only: bool = False) -> "CrossEncoder":
        """`from_pretrained` of files that were looked up, on the CPU. trained_only: raise ValueError for a model
        without a trained head, in place of a warning."""
        path = files.path
        saved = read_settings(path)
        if saved is not None and saved.model_type != cls.model_type:
            raise ValueError(f"{path} was saved as {saved.model_type}; load it with LLMDecoder.from_pretrained")
        for name in options.given("seq", "special_token", "head", "cutoff_layer", *YES_NO_NAMES):
            logger.warning("%s is for decoders, and %s is an encoder; ignored", name, path)
        model, new_parameters = load_classifier(
            path, choose_dtype(options.dtype), options.trust_remote_code, options.attn_implementation
        )
        check_is_encoder(path, model)
        (check_is_trained if trained_only else warn_of_new_parameters)(path, new_parameters)
        tokenizer = load_tokenizer(path, options.trust_remote_code, options.split_special_tokens)
        lower_case_like(files, tokenizer)
        set_encoder_pad_token(model, tokenizer)
        check_vocabulary(path, model, tokenizer)
        saved_length, trained = saved and saved.max_len, not new_parameters
        max_length = choose_max_length(options.max_length, saved_length, files, tokenizer, model, trained)
        tokenizer.model_max_length = max_length  # other libraries truncate by it
        formats = choose_formats(files, options, saved)
        pools_at_eos = model.config.is_encoder_decoder
        template = template_for(model, tokenizer, formats)
        template = replace(template, truncate_left=truncates_left(tokenizer, trained=not new_parameters))
        split = pools_at_eos or tokenizer.split_special_tokens
        encoder = PairEncoder(tokenizer, template, max_length, split)
        kept = {name: text for name, text in formats.items() if text != NO_FORMAT}
        settings = RerankerSettings(cls.model_type, max_length, **kept)
        scorer = cls(model, encoder, settings, new_parameters, options.attn_implementation)
        scorer.calibration = read_calibration(path)
        return scorer

    @cached_property
    def packed_head(self) -> Head | None:
        return ENCODER_HEADS.get(self.config.model_type)

    def scores_of(self, inputs: dict[str, torch.Tensor], lengths: torch.Tensor) -> torch.Tensor:
        return self.model(**inputs).logits.squeeze(-1).float()

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As of every scorer, and the file by which servers cut pairs at the same length."""
        super().save_pretrained(folder, state_dict)
        write_encoder_files(Path(folder), self.settings)


def check_is_encoder(path: str, model: PreTrainedModel) -> None:
    if is_decoder(model):
        name = type(model).__name__
        raise ValueError(f"{path} is a {name}, a decoder; use LLMDecoder (model_type: llm_decoder)")
    if getattr(model.config, "is_decoder", False):
        raise ValueError(
            f"{path}: config.json says is_decoder: true, so that the first token, where the score is read, would see "
            "no other; set it to false for an encoder"
        )


def choose_formats(files: ModelFiles, options: ModelOptions, saved: RerankerSettings | None) -> dict[str, str]:
    """query_format and document_format: given, else saved, else sentence-transformers' default prompt before a query.

    Both are "{}" where none of these has one.
    """
    prompt = files.default_prompt if saved is None else None
    defaults = {"query_format": (prompt or "").replace("{}", "") + NO_FORMAT, "document_format": NO_FORMAT}
    return {
        name: choose_setting(
            name, getattr(options, name), saved and (getattr(saved, name) or NO_FORMAT), defaults[name]
        )
        for name in TEXT_FORMATS
    }


def template_for(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, formats: dict[str, str]
) -> PairTemplate:
    """The tokenizer's pair layout with the formats around the texts, without segment ids where the model has no
    embedding for them."""
    template = with_formats(encoder_template(tokenizer), tokenizer, formats)
    if template.types is None:
        return template
    segments = getattr(model.config, "type_vocab_size", 0)
    if segments >= 2 and "token_type_ids" in inspect.signature(model.forward).parameters:
        return template
    tokenizer.model_input_names = [name for name in tokenizer.model_input_names if name != "token_type_ids"]
    # save_pretrained writes only the attributes that init_kwargs names
    tokenizer.init_kwargs["model_input_names"] = tokenizer.model_input_names
    return replace(template, types=None)


def with_formats(
    template: PairTemplate, tokenizer: PreTrainedTokenizerBase, formats: dict[str, str]
) -> PairTemplate:
    """Text before and after a query or document is tokenized with it; what stands after it stays where it is cut."""
    for side in ("query", "document"):
        before, after = split_format(f"{side}_format", formats[f"{side}_format"])
        end = tuple(tokenize(bare(tokenizer), [after])[0]) if after else ()
        template = replace(
            template, **{f"before_{side}": before, f"after_{side}": after, f"{side}_end": end}
        )
    return template
