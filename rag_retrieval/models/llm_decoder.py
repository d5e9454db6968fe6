"""`LLMDecoder`: Qwen, Llama, Mistral, Gemma and relatives as rerankers with a scalar head.

The text is `query_format + seq + document_format + special_token`; the score is read at the last token of the
special token. That position is found by length, never by looking for padding: a pad token may equal eos, and
the special token may be eos.
"""

import os

import torch

from rag_retrieval.models.calibration import read_calibration
from rag_retrieval.models.model_files import (
    RerankerSettings,
    choose_setting,
    read_settings,
    resolve_model_path,
)
from rag_retrieval.models.model_loading import (
    choose_max_length,
    is_decoder,
    load_classifier,
    load_tokenizer,
    warn_of_new_parameters,
)
from rag_retrieval.models.packed_forward import Head, last_token_head
from rag_retrieval.models.pad_token import set_decoder_pad_token
from rag_retrieval.models.pair_batch import PairBatch, on_device, padded_inputs
from rag_retrieval.models.pair_encoding import PairEncoder, decoder_template
from rag_retrieval.models.pair_scorer import PairScorer

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
    ) -> "LLMDecoder":
        """Load a causal language model (with a fresh score head, and a warning) or a trained reranker.

        Formats, `seq`, `special_token` and `max_length` come from the folder where it was saved by this
        library; an argument that differs wins, with a warning. For other folders the defaults are
        "query: {}", "document: {}", "\\n", "\\nrelevance" and 512 tokens. dtype: of the weights; default
        float32. Raises ValueError for num_labels other than 1, an encoder model, a format without exactly one
        `{}`, and a max_length beyond the model's positions.
        """
        path = resolve_model_path(model_name_or_path)
        saved = read_settings(path)
        if saved is not None and saved.model_type != cls.model_type:
            raise ValueError(
                f"{path} was saved as {saved.model_type}; load it with CrossEncoder.from_pretrained"
            )
        given = dict(
            query_format=query_format, document_format=document_format, seq=seq, special_token=special_token
        )
        formats = {
            name: choose_setting(name, value, saved and getattr(saved, name), DEFAULT_FORMATS[name])
            for name, value in given.items()
        }
        tokenizer = load_tokenizer(path, trust_remote_code)
        template = decoder_template(tokenizer, **formats)
        model, new_parameters = load_classifier(
            path,
            num_labels=num_labels,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
        )
        if not is_decoder(model):
            name = type(model).__name__
            raise ValueError(f"{path} is a {name}, an encoder; use CrossEncoder (model_type: bert_encoder)")
        warn_of_new_parameters(path, new_parameters)
        set_decoder_pad_token(model, tokenizer, template.suffix[-1])
        max_length = choose_max_length(max_length, saved and saved.max_len, model)
        settings = RerankerSettings(cls.model_type, max_length, **formats)
        encoder = PairEncoder(tokenizer, template, max_length)
        scorer = cls(model, encoder, settings, new_parameters, attn_implementation)
        scorer.calibration = read_calibration(path)
        return scorer

    @property
    def packed_head(self) -> Head:
        return last_token_head

    def padded_scores(self, batch: PairBatch) -> torch.Tensor:
        inputs = padded_inputs(batch, self.tokenizer.pad_token_id)
        backbone = getattr(self.model, self.model.base_model_prefix)
        hidden = backbone(**inputs, use_cache=False).last_hidden_state
        rows = torch.arange(len(batch), device=hidden.device)
        last = on_device(batch.lengths, hidden.device) - 1
        # the head reads one position per pair, so it is applied to that position alone
        return self.model.score(hidden[rows, last]).squeeze(-1).float()
