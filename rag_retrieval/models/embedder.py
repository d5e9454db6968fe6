"""`EmbeddingModel`: of a text a dense vector, lexical weights, token vectors, or several of them, from an encoder or a
decoder of Hugging Face.

    dense vector = projections(pooling(token states of the last layer)), in float32

It is not normalized here: Matryoshka cuts it first. `settings.normalize` says whether those who use the model normalize
it after that. `models.lexical` and `models.multi_vector` have the other two.
"""

import inspect
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from rag_retrieval.models.embedder_loading import load_parts
from rag_retrieval.models.embedding_files import EmbedderSettings, HeadFiles, write_settings
from rag_retrieval.models.embedding_heads import (
    LATENT_FOLDER,
    WEIGHTS,
    Head,
    LatentAttention,
    Projection,
    dense_folder,
    load_weights,
    names_in_file,
    read_token_heads,
    save_token_heads,
)
from rag_retrieval.models.kept_tokens import cls_copies, tokens_with_vectors, unattended_tokens
from rag_retrieval.models.lexical import linear_weights, splade_weights
from rag_retrieval.models.multi_vector import skiplist_ids, token_vectors
from rag_retrieval.models.options import EmbedderOptions, options_among
from rag_retrieval.models.packed_model import packed_outputs, packing_problem, pairs_to_check, sliding_window
from rag_retrieval.models.packing import Packing, on_device, padded_inputs
from rag_retrieval.models.pooling import packed_sums, token_weights
from rag_retrieval.models.representation_files import SPLADE, RepresentationOptions
from rag_retrieval.models.representations import DENSE, LEXICAL, MULTI_VECTOR, Lexical, Representations, TokenVectors
from rag_retrieval.models.settings import ModelFiles, resolve_model_path
from rag_retrieval.models.text_encoding import TextEncoder
from rag_retrieval.models.token_batch import TokenBatch, make_batch
from rag_retrieval.models.transformer import TransformerModule

logger = logging.getLogger(__name__)


class EmbeddingModel(TransformerModule):
    """Build it with `from_pretrained`.

    `text_encoder` turns texts into ids, `settings` says how vectors are made, `dim` is their width. `heads` are the
    modules with weights outside of `model`, trained and saved with it, by the name of their folder, that make the dense
    vector; `token_heads` those of the other representations, by their names.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        text_encoder: TextEncoder,
        settings: EmbedderSettings,
        new_parameters: set[str],
        causal: bool,
        heads: Mapping[str, Head],
        token_heads: Mapping[str, nn.Module],
        attn_implementation: str | None = None,
    ):
        super().__init__(model, new_parameters)
        self.text_encoder = text_encoder
        self.settings = settings
        self.causal = causal
        self.heads, self.token_heads = nn.ModuleDict(heads), nn.ModuleDict(token_heads)
        self.skiplist = skiplist_ids(self.tokenizer, settings.skiplist_words)
        self.packing_problem = self._packing_problem(attn_implementation)

    def _packing_problem(self, attn_implementation: str | None) -> str | None:
        if attn_implementation is not None:
            return f"attn_implementation {attn_implementation} was asked for"
        texts = pairs_to_check(self.model, self.text_encoder)
        if self.settings.query_expansion and not self._pads_expansion:
            texts.append(self.text_encoder.expand(texts[0]))
        batch = make_batch(texts)
        has_dense, others = DENSE in self.settings.representations, self.settings.representations != (DENSE,)

        def rows(states_of: Callable) -> torch.Tensor:
            """Of every kind of forward that there will be: [texts and tokens, hidden], numbers of order one."""
            of_dense = [self._pool(*states_of(batch, True), batch)] if has_dense else []
            of_tokens = [states_of(batch, False)[0].float()] if others else []
            return torch.cat([nn.functional.normalize(each) for each in of_dense + of_tokens]) * self.width**0.5

        return packing_problem(
            self.model,
            lambda _: rows(self._padded_states),
            lambda _: rows(self._packed_states),
            batch,
            reads_one_token=has_dense and self.settings.reads_one_token,
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.text_encoder.tokenizer

    @property
    def special_ids(self) -> np.ndarray:
        """Ids of special tokens, which have no lexical weight by a linear head."""
        return np.array(self.tokenizer.all_special_ids, np.int32)

    @property
    def width(self) -> int:
        """Numbers in a token's state."""
        return self.config.get_text_config().hidden_size

    @property
    def is_decoder(self) -> bool:
        """Whether it is a decoder, be it one whose tokens see those after them."""
        return self.causal or self.settings.bidirectional

    @property
    def dim(self) -> int:
        """Numbers in a dense vector."""
        widths = [head.out_features for head in self.heads.values() if isinstance(head, Projection)]
        return widths[-1] if widths else self.width

    @property
    def shares_queries(self) -> bool:
        """Whether a prompt that consecutive texts begin with is computed once: packed, and read at the last token."""
        settings = self.settings
        return self.causal and settings.pooling == "last" and settings.representations == (DENSE,) and self.packs

    def forward(self, batch: TokenBatch, outputs: Sequence[str] | None = None) -> Representations:
        """outputs: names of representations, of those of `settings`; None for all of them."""
        names = self.settings.representations if outputs is None else outputs
        dense_alone = not {LEXICAL, MULTI_VECTOR} & set(names)
        packed = self.packs and not (self._pads_expansion and batch.expansion.any())
        states, pooled = (self._packed_states if packed else self._padded_states)(batch, dense_alone)
        return Representations(
            self.project(self._pool(states, pooled, batch)) if DENSE in names else None,
            self._lexical(states, batch) if LEXICAL in names else None,
            self._token_vectors(states, batch) if MULTI_VECTOR in names else None,
        )

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """[texts, hidden] to [texts, dim], float32."""
        with torch.autocast(pooled.device.type, enabled=False):
            for head in self.heads.values():
                if isinstance(head, Projection):
                    pooled = head(pooled)
        return pooled

    def _packed_states(self, batch: TokenBatch, dense_alone: bool) -> tuple[torch.Tensor, torch.Tensor]:
        """The last layer's states, [tokens, hidden], text after text, and the places of those that a text is read at,
        [texts]. dense_alone: without other outputs, where shared prefixes count once, or the states are those of the
        pooled tokens alone, [texts, hidden], as after `prune_last_layer`."""
        last = self.settings.pooling == "last"
        shares = self.causal and last and dense_alone
        unattended = unattended_tokens(batch, self.settings)
        packing = Packing(batch, shares, self.device, self.first_position, last, dense_alone, unattended)
        return packed_outputs(self.model, batch, packing).last_hidden_state[0], packing.pooled_index

    def _padded_states(self, batch: TokenBatch, _: bool) -> tuple[torch.Tensor, torch.Tensor]:
        unattended = unattended_tokens(batch, self.settings)
        inputs = padded_inputs(batch, self.tokenizer.pad_token_id, self.device, unattended)
        hidden = self.states_of(inputs)
        real = np.arange(hidden.shape[1]) < batch.lengths[:, None]
        ends = np.cumsum(batch.lengths, dtype=np.int32)
        pooled = ends - 1 if self.settings.pooling == "last" else ends - batch.lengths
        states = hidden.flatten(0, 1)[on_device(np.flatnonzero(real), self.device)]
        return states, on_device(pooled, self.device)

    def _pool(self, states: torch.Tensor, pooled: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """[texts, hidden], float32."""
        if self.settings.reads_one_token:
            return (states if len(states) == len(pooled) else states[pooled]).float()
        return packed_sums(self.attend_to_latents(states), self._token_weights(batch), batch.lengths)

    def _lexical(self, states: torch.Tensor, batch: TokenBatch) -> Lexical:
        if self.settings.lexical == SPLADE:
            kept = ~self._cls_copies(batch)
            lengths = np.add.reduceat(kept, np.cumsum(batch.lengths) - batch.lengths, dtype=np.int32)
            kept_states = states if kept.all() else states[on_device(np.flatnonzero(kept), states.device)]
            return splade_weights(self.model, kept_states, lengths)
        with torch.autocast(states.device.type, enabled=False):
            return linear_weights(self.lexical_of_tokens(states), batch, self.special_ids)

    def lexical_of_tokens(self, states: torch.Tensor) -> torch.Tensor:
        """By the linear head: [..., hidden] to [...], float32."""
        return self.token_heads[LEXICAL](states)[..., 0].relu()

    def _token_vectors(self, states: torch.Tensor, batch: TokenBatch) -> TokenVectors:
        with torch.autocast(states.device.type, enabled=False):
            return token_vectors(states, self.token_heads[MULTI_VECTOR], batch, self.kept_tokens(batch))

    def kept_tokens(self, batch: TokenBatch) -> np.ndarray:
        """[tokens], bool: which of the batch's tokens have a token vector."""
        return tokens_with_vectors(batch, self.settings, self.text_encoder.template, self.skiplist)

    def _cls_copies(self, batch: TokenBatch) -> np.ndarray:
        return cls_copies(batch, self.settings.cls_interval, len(self.text_encoder.template.suffix))

    @cached_property
    def _pads_expansion(self) -> bool:
        """Whether expanded queries are computed padded: a packed row leaves out keys only where all see all others."""
        attends = self.settings.attend_to_expansion_tokens
        return not attends and (self.causal or sliding_window(self.model) > 0)

    def states_of(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of the Hugging Face model's own inputs, each [texts, longest]: [texts, longest, hidden]."""
        cache = {"use_cache": False} if self._has_cache else {}
        return self.model.base_model(**inputs, **cache).last_hidden_state

    def attend_to_latents(self, states: torch.Tensor) -> torch.Tensor:
        for head in self.heads.values():
            if isinstance(head, LatentAttention):
                states = head(states)
        return states

    def _token_weights(self, batch: TokenBatch) -> np.ndarray:
        settings, suffix = self.settings, len(self.text_encoder.template.suffix)
        return token_weights(settings.pooling, batch, settings.include_prompt, settings.cls_interval, suffix)

    @cached_property
    def _has_cache(self) -> bool:
        """Whether the forward keeps keys and values unless told not to."""
        return "use_cache" in inspect.signature(self.model.base_model.forward).parameters

    @classmethod
    def from_pretrained(
        cls,
        model_name_or_path: str | os.PathLike,
        *,
        pooling: str | None = None,
        prompts: Mapping[str, str] | None = None,
        max_length: int | None = None,
        query_max_length: int | None = None,
        include_prompt: bool | None = None,
        cls_interval: int | None = None,
        normalize: bool | None = None,
        bidirectional: bool | None = None,
        dims: Sequence[int] | None = None,
        representations: Sequence[str] | None = None,
        lexical: str | None = None,
        colbert_dim: int | None = None,
        query_expansion: bool | None = None,
        attend_to_expansion_tokens: bool | None = None,
        skiplist_words: Sequence[str] | None = None,
        dtype: torch.dtype | str | None = None,
        trust_remote_code: bool = False,
        attn_implementation: str | None = None,
        cut_lengths: bool = False,
    ) -> "EmbeddingModel":
        """Load a base model or a trained embedding model, on the CPU.

        model_name_or_path: a folder, a hub name, or `package:NAME` for a model inside a Python package. An argument
        that is not given comes from the folder, where it says it, else from the known model of this name. Else pooling
        is "mean" for an encoder and "last" for a decoder, there are no prompts, and vectors are normalized.
        pooling: see `models.pooling`. prompts: text before a text, by name, in place of the folder's of that name.
        max_length: tokens of a text; default as saved, else 512 or the model's limit. query_max_length: of a query;
        default as saved, up to a given max_length, else max_length. include_prompt: whether the tokens of a prompt are
        pooled too. cls_interval: with pooling cls, a long text gets another cls after every so many tokens, and their
        mean is taken. bidirectional: let a decoder's tokens see those after them. dims: widths of a Matryoshka model;
        one beyond the model's own adds a projection to it. dtype: of the backbone's weights; default float32.
        cut_lengths: cut lengths to the positions that the model has.

        representations: some of "dense", "lexical" and "multi_vector"; default what the folder has, else dense. Heads
        that it lacks are new. lexical: "linear" or "splade" (see `models.lexical`); default linear for a new head.
        colbert_dim: numbers in a new token vector; default 128 where token vectors are the only representation, else
        the width of the model. Of token vectors alone: query_expansion, whether queries are filled up to their maximum
        length (default 32 tokens) with mask tokens, true for new ones; attend_to_expansion_tokens, whether other tokens
        see these, false for new ones; skiplist_words, tokens whose vectors documents lose, the punctuation of ASCII for
        new ones. New ones without prompts also get ColBERT's, "[Q] " and "[D] ", as tokens of the vocabulary.

        Raises ValueError for a reranker, an encoder-decoder, a folder whose modules are not known here, settings that
        do not fit the model or each other, and, unless cut_lengths, a length beyond the model's positions.
        """
        given = locals()
        options = options_among(given, EmbedderOptions)
        wanted = RepresentationOptions(**{each.name: given[each.name] for each in fields(RepresentationOptions)})
        files = ModelFiles(resolve_model_path(model_name_or_path))
        return cls.load(files, options, dims, cut_lengths=cut_lengths, wanted=wanted)

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        options: EmbedderOptions,
        dims: Sequence[int] | None = None,
        trained_only: bool = False,
        cut_lengths: bool = False,
        wanted: RepresentationOptions | None = None,
    ) -> "EmbeddingModel":
        """`from_pretrained` of files that were looked up. trained_only: raise ValueError for a model without all of
        its weights and a decoder that does not say how its vectors are made, and warn of such an encoder."""
        parts = load_parts(files, options, wanted or RepresentationOptions(), dims, trained_only, cut_lengths)
        embedder = cls(*parts, options.attn_implementation)
        settings = embedder.settings
        if settings.pooling == "latent_attention" and LATENT_FOLDER not in embedder.heads:
            embedder.add_head(LATENT_FOLDER, LatentAttention(embedder.width))
        if settings.dims and max(settings.dims) > embedder.dim:
            embedder.add_projection(max(settings.dims))
        return embedder

    def add_projection(self, width: int) -> None:
        """Let vectors have `width` numbers, by a new projection; nothing changes where they have as many."""
        if width != self.dim:
            logger.info("a new projection of vectors from %d to %d numbers", self.dim, width)
            self.add_head(f"{2 + len(self.heads)}_Dense", Projection(self.dim, width))

    def add_head(self, folder: str, head: Head) -> None:
        self.heads[folder] = head
        self.new_parameters |= {f"heads.{folder}.{name}" for name, _ in head.named_parameters()}

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write a Hugging Face folder of the bare model in the layout of sentence-transformers.

        state_dict: weights of this module, where an engine has gathered them; default its own.
        """
        folder, config = Path(folder), self.model.config
        dims = list(self.settings.dims)
        if dims or hasattr(config, "matryoshka_dimensions"):  # so that vLLM lets a request name a width
            config.is_matryoshka, config.matryoshka_dimensions = bool(dims), dims
        self.save_weights(folder, state_dict)
        self.write_settings(folder)
        self.save_heads(folder, self.state_dict() if state_dict is None else state_dict)

    def write_settings(self, folder: Path) -> None:
        """The small files that say how vectors are made."""
        heads = [HeadFiles(head.saved_as, name, head.saved_values()) for name, head in self.heads.items()]
        if self.settings.is_colbert:
            layers = self.token_heads[MULTI_VECTOR]
            heads = [HeadFiles(each.saved_as, dense_folder(place), each.saved_values())
                     for place, each in enumerate(layers)]  # fmt: skip
        width = self.config.get_text_config().vocab_size if self.settings.is_splade_alone else self.width
        write_settings(folder, self.settings, width, heads, self.tokenizer.get_vocab(), self.is_decoder)

    def save_heads(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        """The weights outside of `model`, of a state of this module, where `load_heads` finds them."""
        for name, head in self.heads.items():
            before = f"heads.{name}."
            own = {key.removeprefix(before): value for key, value in state_dict.items() if key.startswith(before)}
            (folder / name).mkdir(exist_ok=True)
            save_file(names_in_file(head, own), folder / name / WEIGHTS)
        before = "token_heads."
        own = {key.removeprefix(before): value for key, value in state_dict.items() if key.startswith(before)}
        save_token_heads(folder, self.token_heads, own, self.settings.is_colbert)

    def load_heads(self, folder: Path) -> None:
        for name, head in self.heads.items():
            load_weights(head, load_file(folder / name / WEIGHTS))
        read_token_heads(folder, self.token_heads, self.settings.is_colbert)
