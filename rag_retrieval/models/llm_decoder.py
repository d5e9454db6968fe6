"""`LLMDecoder`: Qwen, Llama, Mistral, Gemma and relatives as rerankers.

The text is `query_format + seq + document_format + special_token`; the score is read at the last token of the
special token, by a scalar head or, as Qwen3-Reranker does it, as the logit of yes minus that of no. That position
is found by length, never by looking for padding: a pad token may equal eos, and the special token may be eos.
"""

import os
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rag_retrieval.models.calibration import read_calibration
from rag_retrieval.models.decoder_template import decoder_template
from rag_retrieval.models.model_files import (
    FORMAT_NAMES,
    HEADS,
    RerankerSettings,
    choose_setting,
    read_settings,
    resolve_model_path,
)
from rag_retrieval.models.model_loading import (
    choose_max_length,
    is_decoder,
    load_causal_model,
    load_classifier,
    load_tokenizer,
    warn_of_new_parameters,
)
from rag_retrieval.models.packed_model import HALF_TOLERANCE, Head, last_token_head
from rag_retrieval.models.pad_token import set_decoder_pad_token
from rag_retrieval.models.pair_encoding import PairEncoder, PairTemplate
from rag_retrieval.models.pair_scorer import PairScorer
from rag_retrieval.models.sentence_transformers_files import write_decoder_files
from rag_retrieval.models.yes_no_head import HALF_TOLERANCE as YES_NO_TOLERANCE
from rag_retrieval.models.yes_no_head import restrict_lm_head_to_tokens, yes_no_head, yes_no_scores
from rag_retrieval.models.yes_no_prompt import answer_tokens, check_instruction, default_formats
from rag_retrieval.models.yes_no_prompts import PROMPTS

DEFAULT_FORMATS = {
    "query_format": "query: {}",
    "document_format": "document: {}",
    "seq": "\n",
    "special_token": "\nrelevance",
}


class LLMDecoder(PairScorer):
    """A causal model that scores a pair at its last token. Build it with `from_pretrained`."""

    model_type = "llm_decoder"
    causal = True

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | os.PathLike,
        num_labels: int = 1,
        query_format: str | None = None,
        document_format: str | None = None,
        seq: str | None = None,
        special_token: str | None = None,
        max_length: int | None = None,
        dtype: torch.dtype | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        head: str | None = None,
        instruction: str | None = None,
        yes_token: str | None = None,
        no_token: str | None = None,
    ) -> "LLMDecoder":
        """Load a causal language model (with a fresh score head, and a warning) or a trained reranker.

        Formats, `seq`, `special_token`, `max_length` and all after `attn_implementation` come from the folder where
        it was saved by this library; an argument that differs wins, with a warning. For other folders the defaults
        are "query: {}", "document: {}", "\\n", "\\nrelevance" and 512 tokens. dtype: of the weights; default
        float32. Raises ValueError for num_labels other than 1, an encoder model, a format without exactly one
        `{}`, and a max_length beyond the model's positions.

        head: "scalar" (the default), or "yes_no", which needs no new weights: score = logit of yes_token - logit of
        no_token, so that its sigmoid is the probability of yes; with no_token "" the logit of yes alone. Then the
        default formats ask Qwen3-Reranker's question in the tokenizer's own chat template; `{instruction}` in a format
        stands for `instruction`. Raises ValueError where a token of the two is not one token, or where there is no
        chat template and no formats.
        """
        path = resolve_model_path(model_name_or_path)
        saved = read_settings(path)
        if saved is not None and saved.model_type != cls.model_type:
            raise ValueError(f"{path} was saved as {saved.model_type}; load it with CrossEncoder.from_pretrained")
        head = choose_setting("head", head, saved and (saved.head or "scalar"), "scalar")
        tokenizer = load_tokenizer(path, trust_remote_code)
        given = dict(query_format=query_format, document_format=document_format, seq=seq, special_token=special_token)
        asked = dict(instruction=instruction, yes_token=yes_token, no_token=no_token)
        texts = choose_texts(tokenizer, head, given, asked, saved)
        formats = {name: texts[name] for name in FORMAT_NAMES}
        template = decoder_template(tokenizer, **formats, instruction=texts.get("instruction"))
        options = dict(
            num_labels=num_labels,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
        model, new_parameters = load_decoder(path, tokenizer, texts, template, options)
        set_decoder_pad_token(model, tokenizer, template.suffix[-1])
        max_length = choose_max_length(max_length, saved and saved.max_len, model)
        settings = RerankerSettings(cls.model_type, max_length, **texts)
        encoder = PairEncoder(tokenizer, template, max_length)
        scorer = cls(model, encoder, settings, new_parameters, attn_implementation)
        scorer.calibration = read_calibration(path)
        return scorer

    @property
    def answers_yes_or_no(self) -> bool:
        return self.settings.head == "yes_no"

    @property
    def half_tolerance(self) -> float:
        return YES_NO_TOLERANCE if self.answers_yes_or_no else HALF_TOLERANCE

    @property
    def packed_head(self) -> Head:
        return yes_no_head if self.answers_yes_or_no else last_token_head

    def scores_of(self, inputs: dict[str, torch.Tensor], lengths: torch.Tensor) -> torch.Tensor:
        backbone = getattr(self.model, self.model.base_model_prefix)
        hidden = backbone(**inputs, use_cache=False).last_hidden_state
        # len(lengths) would be a constant in a traced graph
        rows = torch.arange(lengths.shape[0], device=hidden.device)
        # the head reads one position per pair, so it is applied to that position alone
        read = hidden[rows, lengths - 1]
        if self.answers_yes_or_no:
            return yes_no_scores(self.model, read)
        return self.model.score(read).squeeze(-1).float()

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """As of every scorer, and the files by which sentence-transformers lays out a pair as here."""
        super().save_pretrained(folder, state_dict)
        write_decoder_files(Path(folder), self.pair_encoder, self.settings)


def choose_texts(
    tokenizer: PreTrainedTokenizerBase,
    head: str,
    formats: dict[str, str | None],
    asked: dict[str, str | None],
    saved: RerankerSettings | None,
) -> dict[str, str]:
    """The fields of RerankerSettings that the head needs: given, saved or default.

    formats, asked: the arguments of `from_pretrained` named FORMAT_NAMES and YES_NO_NAMES. Raises ValueError for a
    head that is not known, and for `asked` where it is scalar.
    """
    if head not in HEADS:
        raise ValueError(f"head must be one of {', '.join(HEADS)}, found {head!r}")
    answers = head == "yes_no"
    saved = saved if saved is not None and (saved.head or "scalar") == head else None  # else it asks another question
    for name, value in asked.items():
        if value is not None and not answers:
            raise ValueError(f"{name} is for head: yes_no, and the head is scalar; leave it out")
    defaults = DEFAULT_FORMATS
    if answers and any(value is None and saved is None for value in formats.values()):
        defaults = default_formats(tokenizer)
    chosen = choose_all(formats, saved, defaults)
    if answers:
        check_instruction(chosen, asked["instruction"])
        chosen |= choose_all(asked, saved, PROMPTS["en"]._asdict()) | {"head": head}
    return chosen


def choose_all(
    given: dict[str, str | None], saved: RerankerSettings | None, defaults: dict[str, str]
) -> dict[str, str]:
    return {name: choose_setting(name, value, saved and getattr(saved, name), defaults[name])
            for name, value in given.items()}  # fmt: skip


def load_decoder(
    path: str, tokenizer: PreTrainedTokenizerBase, texts: dict[str, str], template: PairTemplate, options: dict
) -> tuple[PreTrainedModel, set[str]]:
    """The model with the head that the texts are for, and the names of its new parameters."""
    if "yes_token" in texts:
        tokens = answer_tokens(tokenizer, texts["yes_token"], texts["no_token"])
        model = load_causal_model(path, **options)
        restrict_lm_head_to_tokens(model, tokens, template.prefix + template.suffix)
        return model, set()
    model, new_parameters = load_classifier(path, **options)
    if not is_decoder(model):
        name = type(model).__name__
        raise ValueError(f"{path} is a {name}, an encoder; use CrossEncoder (model_type: bert_encoder)")
    warn_of_new_parameters(path, new_parameters)
    return model, new_parameters
