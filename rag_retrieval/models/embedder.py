"""`EmbeddingModel`: a text in, one vector out, from an encoder or a decoder of Hugging Face.

    vector = projections(pooling(token states of the last layer)), in float32

The vector is not normalized here: Matryoshka cuts it first. `settings.normalize` says whether those who use the model
normalize it after that.
"""

import inspect
import logging
import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from rag_retrieval.models.devices import choose_dtype
from rag_retrieval.models.embedding_files import (
    EmbedderSettings,
    HeadFiles,
    check_pooling_is_known,
    check_settings,
    choose_settings,
    is_embedder,
    known_embedder,
    read_heads,
    read_settings,
    write_settings,
)
from rag_retrieval.models.embedding_heads import (
    LATENT_FOLDER,
    WEIGHTS,
    Head,
    LatentAttention,
    Projection,
    load_head,
    load_weights,
)
from rag_retrieval.models.loading import (
    check_max_length,
    check_vocabulary,
    choose_max_length,
    load_model,
    load_tokenizer,
    lower_case_like,
    position_limit,
    set_encoder_pad_token,
    shorten,
    truncates_left,
    warn_of_new_parameters,
)
from rag_retrieval.models.options import EmbedderOptions, options_among
from rag_retrieval.models.packed_model import packed_outputs, packing_problem, pairs_to_check, pooled_states
from rag_retrieval.models.packing import Packing, on_device, padded_inputs
from rag_retrieval.models.pooling import packed_sums, padded_sums, token_weights
from rag_retrieval.models.representations import Representations
from rag_retrieval.models.scoring import evaluating
from rag_retrieval.models.settings import (
    CLASSIFIER,
    SETTINGS_FILE,
    ModelFiles,
    choose_setting,
    find_file,
    read_json,
    resolve_model_path,
)
from rag_retrieval.models.text_encoding import TextEncoder, TextTemplate, append_eos, text_template
from rag_retrieval.models.token_batch import TokenBatch, make_batch
from rag_retrieval.models.transformer import TransformerModule

logger = logging.getLogger(__name__)


class EmbeddingModel(TransformerModule):
    """Build it with `from_pretrained`.

    `text_encoder` turns texts into ids, `settings` says how vectors are made, `dim` is their width. `heads` are the
    modules with weights outside of `model`, trained and saved with it, by the name of their folder.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        text_encoder: TextEncoder,
        settings: EmbedderSettings,
        new_parameters: set[str],
        causal: bool,
        heads: Mapping[str, Head],
        attn_implementation: str | None = None,
    ):
        super().__init__(model, new_parameters)
        self.text_encoder = text_encoder
        self.settings = settings
        self.causal = causal
        self.heads = nn.ModuleDict(heads)
        self.packing_problem = self._packing_problem(attn_implementation)

    def _packing_problem(self, attn_implementation: str | None) -> str | None:
        if attn_implementation is not None:
            return f"attn_implementation {attn_implementation} was asked for"
        batch = make_batch(pairs_to_check(self.model, self.text_encoder))

        def of_order_one(pooled: torch.Tensor) -> torch.Tensor:
            return nn.functional.normalize(pooled) * pooled.shape[1] ** 0.5

        return packing_problem(
            self.model,
            lambda texts: of_order_one(self._padded_pooling(texts)),
            lambda texts: of_order_one(self._packed_pooling(texts)),
            batch,
            reads_one_token=self.settings.reads_one_token,
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.text_encoder.tokenizer

    @property
    def width(self) -> int:
        """Numbers in a token's state."""
        return self.config.get_text_config().hidden_size

    @property
    def dim(self) -> int:
        """Numbers in a vector."""
        widths = [head.out_features for head in self.heads.values() if isinstance(head, Projection)]
        return widths[-1] if widths else self.width

    @property
    def shares_queries(self) -> bool:
        """Whether a prompt that consecutive texts begin with is computed once: packed, and read at the last token."""
        return self.causal and self.settings.pooling == "last" and self.packs

    def forward(self, batch: TokenBatch) -> Representations:
        """Those of `settings.representations`."""
        pooled = self._packed_pooling(batch) if self.packs else self._padded_pooling(batch)
        return Representations(self.project(pooled))

    def project(self, pooled: torch.Tensor) -> torch.Tensor:
        """[texts, hidden] to [texts, dim], float32."""
        with torch.autocast(pooled.device.type, enabled=False):
            for head in self.heads.values():
                if isinstance(head, Projection):
                    pooled = head(pooled)
        return pooled

    def _packed_pooling(self, batch: TokenBatch) -> torch.Tensor:
        last = self.settings.pooling == "last"
        packing = Packing(batch, self.causal and last, self.device, self.first_position, last)
        # [row, hidden], or [texts, hidden] where the last layer computes no more (`prune_last_layer`)
        hidden = packed_outputs(self.model, batch, packing).last_hidden_state[0]
        if self.settings.reads_one_token:
            return pooled_states(hidden, packing).float()
        return packed_sums(self.attend_to_latents(hidden), self._token_weights(batch), batch.lengths)

    def _padded_pooling(self, batch: TokenBatch) -> torch.Tensor:
        hidden = self.states_of(padded_inputs(batch, self.tokenizer.pad_token_id, self.device))
        if self.settings.reads_one_token:
            places = batch.lengths - 1 if self.settings.pooling == "last" else np.zeros_like(batch.lengths)
            return hidden[torch.arange(len(batch), device=hidden.device), on_device(places, self.device)].float()
        return padded_sums(self.attend_to_latents(hidden), self._token_weights(batch), batch.lengths)

    def states_of(self, inputs: dict[str, torch.Tensor]) -> torch.Tensor:
        """Of the Hugging Face model's own inputs, each [texts, longest]: [texts, longest, hidden]."""
        cache = {"use_cache": False} if self._has_cache else {}
        return self.model(**inputs, **cache).last_hidden_state

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
        return "use_cache" in inspect.signature(self.model.forward).parameters

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

        Raises ValueError for a reranker, an encoder-decoder, a folder whose modules are not known here, settings that
        do not fit the model or each other, and, unless cut_lengths, a length beyond the model's positions.
        """
        options = options_among(locals(), EmbedderOptions)
        files = ModelFiles(resolve_model_path(model_name_or_path))
        return cls.load(files, options, dims, cut_lengths=cut_lengths)

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        options: EmbedderOptions,
        dims: Sequence[int] | None = None,
        trained_only: bool = False,
        cut_lengths: bool = False,
    ) -> "EmbeddingModel":
        """`from_pretrained` of files that were looked up. trained_only: raise ValueError for a model without all of
        its weights and a decoder that does not say how its vectors are made, and warn of such an encoder."""
        path, trained = files.path, is_embedder(files)
        refuse_reranker(files)
        saved, known = read_settings(files), known_embedder(files)
        if not {"pooling", "prompts"} & known.keys() <= saved.keys():
            logger.info("%s: as the card of the model of its name says: %s", path, known)
        model, new_parameters, bidirectional = load_backbone(
            files, options, saved.get("bidirectional", False), trained_only
        )
        causal = is_causal(model)
        is_decoder = causal or bidirectional
        tokenizer = load_tokenizer(path, options.trust_remote_code)
        lower_case_like(files, tokenizer)
        if is_decoder:
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        else:
            set_encoder_pad_token(model, tokenizer)
        check_vocabulary(path, model, tokenizer)
        limit = position_limit(model)
        if cut_lengths and limit is not None:
            given = options.given("max_length", "query_max_length")
            options = options.model_copy(update={name: min(length, limit) for name, length in given.items()})
        saved_length = files.max_seq_length if trained else None
        if saved_length is not None:
            saved_length = min(saved_length, limit or saved_length)
        max_length = choose_max_length(options.max_length, saved_length, files, tokenizer, model, trained)
        tokenizer.model_max_length = max_length  # other libraries truncate by it
        if "pooling" not in known | saved and options.pooling is None:
            check_pooling_is_known(path, is_decoder, trained_only)
        values = {"pooling": "last" if is_decoder else "mean"} | known | saved
        eos_token = values.pop("eos_token", None)
        settings = choose_settings(values, options, dims, max_length=max_length, bidirectional=bidirectional)
        check_settings(path, settings, causal)
        if settings.query_max_length is not None:
            check_max_length(settings.query_max_length, model, "query_max_length")
        template = choose_template(files, tokenizer, settings, is_decoder, eos_token)
        if "token_type_ids" not in inspect.signature(model.forward).parameters:
            template = replace(template, has_types=False)
        encoder = TextEncoder(tokenizer, template, settings.prompts, settings.max_lengths, settings.default_prompt)
        heads = {each.folder: load_head(files, each) for each in read_heads(files)}
        embedder = cls(model, encoder, settings, new_parameters, causal, heads, options.attn_implementation)
        if settings.pooling == "latent_attention" and LATENT_FOLDER not in heads:
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
        write_settings(folder, self.settings, self.width, heads)

    def save_heads(self, folder: Path, state_dict: dict[str, torch.Tensor]) -> None:
        """The weights outside of `model`, of a state of this module, where `load_heads` finds them."""
        for name, head in self.heads.items():
            before = f"heads.{name}."
            own = {key: value.contiguous() for key, value in state_dict.items() if key.startswith(before)}
            (folder / name).mkdir(exist_ok=True)
            in_file = {head.name_prefix + key.removeprefix(before): value for key, value in own.items()}
            save_file(in_file, folder / name / WEIGHTS)

    def load_heads(self, folder: Path) -> None:
        for name, head in self.heads.items():
            load_weights(head, load_file(folder / name / WEIGHTS))


# ---- parts of loading -----------------------------------------------------------------------------------


def refuse_reranker(files: ModelFiles) -> None:
    """Raises ValueError for a reranker: its states tell of a pair, not of a text."""
    if is_reranker(files):
        raise ValueError(
            f"{files.path} is a reranker ({files.architecture}); give an embedding model, or a base model to train one"
        )


def is_reranker(files: ModelFiles) -> bool:
    """Whether the folder holds a reranker of any program."""
    ours = find_file(files.path, SETTINGS_FILE) is not None
    return ours or files.architecture.endswith(CLASSIFIER) or files.logit_score is not None


def load_backbone(
    files: ModelFiles, options: EmbedderOptions, saved_as_bidirectional: bool, trained_only: bool
) -> tuple[PreTrainedModel, set[str], bool]:
    """The model without a head, the names of its new parameters, and whether it is a decoder made bidirectional.

    BERT's own pooler has no part in a vector: it is kept as it is, untrained, for those who read the folder. Raises
    ValueError for an encoder-decoder, with trained_only for new parameters, and for `bidirectional` of a model that is
    no decoder, or stays causal.
    """
    path = files.path
    bidirectional = choose_setting("bidirectional", options.bidirectional, saved_as_bidirectional or None, False)
    attention = {"is_causal": not bidirectional} if bidirectional or saved_as_bidirectional else {}
    model, new_parameters = load_model(
        AutoModel,
        path,
        choose_dtype(options.dtype),
        options.trust_remote_code,
        options.attn_implementation,
        attention,
    )
    name = type(model).__name__
    if model.config.is_encoder_decoder:
        raise ValueError(f"{path}: a {name} is an encoder-decoder; give an encoder or a decoder")
    if getattr(model, "pooler", None) is not None:
        model.pooler.requires_grad_(False)
    new_parameters = {name for name in new_parameters if not name.startswith("pooler.")}
    if new_parameters and trained_only:
        raise ValueError(f"{path}: it lacks weights, which would be random: {shorten(sorted(new_parameters))}")
    warn_of_new_parameters(path, new_parameters)
    is_decoder = any(getattr(module, "is_causal", False) for module in model.modules())
    if options.bidirectional and not is_decoder:
        raise ValueError(f"{path}: bidirectional is for decoders of transformers, which a {name} is not; leave it out")
    if bidirectional and is_causal(model):
        raise ValueError(f"{path}: a {name} stays causal; leave bidirectional out")
    return model, new_parameters, bidirectional and is_decoder


def is_causal(model: PreTrainedModel) -> bool:
    """Whether a text's first token sees none of those after it."""
    ids = torch.tensor([[0, 1, 2], [0, 1, 3]])
    with evaluating(model):
        first, second = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
    return torch.allclose(first, second, rtol=1e-4, atol=1e-5)  # rows of one product may round in two ways


def choose_template(
    files: ModelFiles,
    tokenizer: PreTrainedTokenizerBase,
    settings: EmbedderSettings,
    is_decoder: bool,
    eos_token: str | None,
) -> TextTemplate:
    """The tokenizer's own, with an eos token after a decoder's text: eos_token, that of a known model, else the
    tokenizer's for a base model, or where add_eos_token asks for it, which transformers 5 does not heed."""
    path, template, trained = files.path, text_template(tokenizer), is_embedder(files)
    if is_decoder and not template.suffix:
        asked_for = read_json(path, "tokenizer_config.json").get("add_eos_token") is True
        if eos_token is None and (not trained or asked_for):
            eos_token = tokenizer.eos_token
            if eos_token is None:
                raise ValueError(f"{path}: its tokenizer has no eos token, which ends a decoder's text")
        if eos_token is not None:
            template = append_eos(tokenizer, template, eos_token)
    if settings.cls_interval is not None and len(template.prefix) != 1:
        raise ValueError(f"{path}: cls_interval is for models whose texts begin with one cls token; leave it out")
    left = truncates_left(tokenizer, trained)
    return replace(template, cls_interval=settings.cls_interval, truncate_left=left)
