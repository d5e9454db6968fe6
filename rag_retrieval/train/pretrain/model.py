"""The model of a pre-training: an encoder with the head of a masked language model and, for RetroMAE, a decoder.

All losses but that of the vectors are computed inside its forward, where engines that shard weights have them whole.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rag_retrieval.losses.vocabulary import bag_of_words_loss, token_cross_entropy
from rag_retrieval.models.embedding_files import EmbedderSettings, read_settings, write_settings
from rag_retrieval.models.embedding_heads import read_heads
from rag_retrieval.models.loading import check_vocabulary, load_tokenizer, position_limit, set_encoder_pad_token
from rag_retrieval.models.masked_decoder import MaskedDecoder
from rag_retrieval.models.mlm_head import head_states, load_masked_lm
from rag_retrieval.models.packed_model import packed_outputs, packing_problem, pairs_to_check
from rag_retrieval.models.packing import Packing, on_device, padded_inputs
from rag_retrieval.models.pooling import packed_sums, token_weights
from rag_retrieval.models.representation_files import LINEAR_FILES, heads_in
from rag_retrieval.models.settings import ModelFiles, resolve_model_path
from rag_retrieval.models.text_encoding import TextEncoder, text_template
from rag_retrieval.models.token_batch import TokenBatch, concatenated_ranges, make_batch
from rag_retrieval.models.transformer import TransformerModule
from rag_retrieval.train.pretrain.training_data import PretrainMicroBatch

logger = logging.getLogger(__name__)

DECODER_FILE = "masked_decoder.safetensors"


@dataclass(frozen=True)
class DecodingOptions:
    """masked: share of a text's tokens that a position of the decoder may not look at. bag_of_words: weight of that
    loss; 0 without it."""

    masked: float
    bag_of_words: float


class PretrainOutputs(NamedTuple):
    """sums: float32 [losses], summed over a micro-batch, in the order of its `items`: of masked tokens, and for
    RetroMAE of the tokens that the decoder predicts and, weighted, of bags of words. vectors: float32 [texts, hidden].
    """

    sums: torch.Tensor
    vectors: torch.Tensor


class PretrainingModel(TransformerModule):
    """decoding: None for a model without a decoder. `text_encoder` turns texts into ids, `settings` says how the folder
    that is saved makes vectors."""

    causal = False

    def __init__(
        self,
        model: PreTrainedModel,
        text_encoder: TextEncoder,
        settings: EmbedderSettings,
        new_parameters: set[str],
        decoding: DecodingOptions | None,
        attn_implementation: str | None = None,
    ):
        super().__init__(model, new_parameters)
        self.text_encoder, self.settings, self.decoding = text_encoder, settings, decoding
        self.decoder = None if decoding is None else MaskedDecoder(model.config, settings.max_length)
        if self.decoder is not None:
            self.new_parameters |= {f"decoder.{name}" for name, _ in self.decoder.named_parameters()}
        self.packing_problem = f"attn_implementation {attn_implementation} was asked for"
        if attn_implementation is None:
            self.packing_problem = packing_problem(
                model,
                lambda texts: of_order_one(self._padded_states(texts)),
                lambda texts: of_order_one(self._packed_states(texts)),
                make_batch(pairs_to_check(model, text_encoder)),
                reads_one_token=False,
            )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.text_encoder.tokenizer

    def forward(self, batch: PretrainMicroBatch, with_losses: bool = True) -> PretrainOutputs:
        """with_losses: False gives vectors alone, and no sums."""
        lengths = batch.texts.lengths
        states = self._packed_states(batch.texts) if self.packs else self._padded_states(batch.texts)
        if self.settings.pooling == "cls":
            vectors = states[on_device(np.cumsum(lengths) - lengths, self.device)].float()
        else:
            vectors = packed_sums(states, token_weights("mean", batch.texts), lengths)
        if not with_losses:
            return PretrainOutputs(vectors.new_zeros(0), vectors)
        sums = [self._token_loss(states[self._on_device(batch.masked)], batch.ids[batch.masked])]
        if self.decoding is not None:
            sums += self._decoder_losses(batch, states, vectors)
        return PretrainOutputs(torch.stack(sums) * float(batch.counted), vectors)

    def _token_loss(self, states: torch.Tensor, ids: np.ndarray) -> torch.Tensor:
        output = self.model.get_output_embeddings()
        labels = self._on_device(ids)
        return token_cross_entropy(head_states(self.model, states), output.weight, output.bias, labels)

    def _decoder_losses(
        self, batch: PretrainMicroBatch, states: torch.Tensor, vectors: torch.Tensor
    ) -> list[torch.Tensor]:
        lengths, suffix = batch.texts.lengths, len(self.text_encoder.template.suffix)
        own = lengths - 1 - suffix
        places = concatenated_ranges(np.cumsum(lengths, dtype=np.int32) - lengths + 1, own)
        embeddings = self.model.get_input_embeddings()(self._on_device(batch.ids))
        decoded = self.decoder(vectors, embeddings, lengths, batch.seeds, self.decoding.masked, suffix)
        losses = [self._token_loss(decoded, batch.ids[places])]
        if self.decoding.bag_of_words:
            output = self.model.get_output_embeddings()
            own_states = head_states(self.model, states[self._on_device(places)])
            words = [self._on_device(np.unique(ids)) for ids in np.split(batch.ids[places], np.cumsum(own)[:-1])]
            loss = bag_of_words_loss(own_states, output.weight, output.bias, own.tolist(), words)
            losses.append(self.decoding.bag_of_words * loss)
        return losses

    def _on_device(self, values: np.ndarray) -> torch.Tensor:
        return on_device(values, self.device)

    def _packed_states(self, texts: TokenBatch) -> torch.Tensor:
        """Of all tokens, text after text: [tokens, hidden]."""
        packing = Packing(texts, False, self.device, self.first_position)
        return packed_outputs(self.model, texts, packing).last_hidden_state[0]

    def _padded_states(self, texts: TokenBatch) -> torch.Tensor:
        inputs = padded_inputs(texts, self.tokenizer.pad_token_id, self.device)
        states = self.model.base_model(**inputs).last_hidden_state
        rows = np.arange(len(texts), dtype=np.int32) * np.int32(states.shape[1])
        return states.flatten(0, 1)[self._on_device(concatenated_ranges(rows, texts.lengths))]

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str,
        max_length: int,
        pooling: str = "cls",
        decoding: DecodingOptions | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
    ) -> "PretrainingModel":
        """An encoder with a new decoder, and with a new head where its folder has none, on the CPU, weights in float32.

        Raises ValueError for a model that is no encoder of a known family, for max_length beyond its positions, and for
        a tokenizer without a mask token or that does not put one token before a text.
        """
        files = ModelFiles(resolve_model_path(model_name_or_path))
        model, new_parameters = load_masked_lm(files.path, trust_remote_code, attn_implementation)
        tokenizer = load_tokenizer(files.path, trust_remote_code)
        set_encoder_pad_token(model, tokenizer)
        check_vocabulary(files.path, model, tokenizer)
        limit = position_limit(model)
        if limit is not None and max_length > limit:
            raise ValueError(f"max_len {max_length} is more than the {limit} tokens that this model has positions for")
        template = text_template(tokenizer)
        if len(template.prefix) != 1 or tokenizer.mask_token_id is None:
            raise ValueError(
                f"{files.path}: its tokenizer puts {len(template.prefix)} tokens before a text and has "
                f"{'no' if tokenizer.mask_token_id is None else 'a'} mask token; expected one token and a mask token"
            )
        tokenizer.model_max_length = max_length
        settings = EmbedderSettings(pooling=pooling, max_length=max_length)
        encoder = TextEncoder(tokenizer, template, {}, settings.max_lengths)
        warn_of_lost_parts(files)
        return cls(model, encoder, settings, new_parameters, decoding, attn_implementation)

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """A Hugging Face folder of the encoder with its head, which an embedder starts from, and the decoder's weights.

        state_dict: weights of this module, where an engine has gathered them; default its own.
        """
        folder = Path(folder)
        self.save_weights(folder, state_dict)
        write_settings(folder, self.settings, self.config.hidden_size, [], self.tokenizer.get_vocab())
        self.save_heads(folder, self.state_dict() if state_dict is None else state_dict)

    def save_heads(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        """The decoder, of a state of this module."""
        before = "decoder."
        own = {name.removeprefix(before): value for name, value in state_dict.items() if name.startswith(before)}
        if own:
            save_file({name: value.contiguous() for name, value in own.items()}, folder / DECODER_FILE)

    def load_heads(self, folder: Path) -> None:
        self.decoder.load_state_dict(load_file(folder / DECODER_FILE))


def of_order_one(states: torch.Tensor) -> torch.Tensor:
    """[tokens, hidden], each of length sqrt(hidden)."""
    return nn.functional.normalize(states) * states.shape[1] ** 0.5


def warn_of_lost_parts(files: ModelFiles) -> None:
    """Of an embedder's folder: what is not of the encoder, and so not in the folder that is saved."""
    prompts = read_settings(files).get("prompts")
    lost = [*(["prompts"] if prompts else []), *(head.folder for head in read_heads(files))]
    lost += [LINEAR_FILES[name] for name in heads_in(files)]
    if lost:
        logger.warning("%s: not kept, as pre-training is of the encoder alone: %s", files.path, ", ".join(lost))
