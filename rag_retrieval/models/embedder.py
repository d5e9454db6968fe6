"""`EmbeddingModel`: a text in, one vector out, from an encoder or a decoder of Hugging Face.

    vector = projections(pooling(token states of the last layer)), in float32

The vector is not normalized here: Matryoshka cuts it first, and says `settings.normalize` whether a user of the model
does it after that.
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
from tokenizers import processors
from torch import nn
from transformers import AutoModel, PreTrainedModel, PreTrainedTokenizerBase

from rag_retrieval.models.devices import choose_dtype
from rag_retrieval.models.embedding_files import (
    EmbedderSettings,
    HeadFiles,
    is_embedder,
    known_embedder,
    read_heads,
    read_settings,
    write_settings,
)
from rag_retrieval.models.loading import (
    check_vocabulary,
    choose_max_length,
    load_model,
    load_tokenizer,
    lower_case_like,
    position_limit,
    reading,
    set_encoder_pad_token,
    truncates_left,
    warn_of_new_parameters,
)
from rag_retrieval.models.options import EmbedderOptions, options_among
from rag_retrieval.models.packed_model import packed_outputs, packing_problem, pairs_to_check, pooled_states
from rag_retrieval.models.packing import Packing, on_device, padded_inputs
from rag_retrieval.models.pooling import LatentAttention, Projection, token_weights, weighted_sum_of_tokens
from rag_retrieval.models.scoring import evaluating
from rag_retrieval.models.settings import (
    CLASSIFIER,
    SETTINGS_FILE,
    ModelFiles,
    choose_setting,
    find_file,
    parsing,
    resolve_model_path,
)
from rag_retrieval.models.text_encoding import TextEncoder, TextTemplate, text_template
from rag_retrieval.models.token_batch import TokenBatch, concatenated_ranges, make_batch
from rag_retrieval.models.transformer import TransformerModule

logger = logging.getLogger(__name__)

Head = LatentAttention | Projection
HEADS: dict[str, type[Head]] = {head.saved_as: head for head in (LatentAttention, Projection)}
WEIGHTS = "model.safetensors"


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
            reads_one_token=self.reads_one_token,
        )

    @property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        return self.text_encoder.tokenizer

    @property
    def dim(self) -> int:
        """Numbers in a vector."""
        widths = [projection.out_features for projection in self.projections]
        return widths[-1] if widths else self.config.get_text_config().hidden_size

    @property
    def projections(self) -> list[Projection]:
        return [head for head in self.heads.values() if isinstance(head, Projection)]

    @property
    def reads_one_token(self) -> bool:
        return self.settings.pooling in ("cls", "last") and self.settings.cls_interval is None

    @property
    def shares_queries(self) -> bool:
        """Whether a prompt that consecutive texts begin with is computed once: packed, and read at the last token."""
        return self.causal and self.settings.pooling == "last" and self.packs

    def forward(self, batch: TokenBatch) -> torch.Tensor:
        """Vectors of the texts, not normalized: [texts, dim], float32, on the model's device."""
        vectors = self._packed_pooling(batch) if self.packs else self._padded_pooling(batch)
        with torch.autocast(vectors.device.type, enabled=False):
            for projection in self.projections:
                vectors = projection(vectors)
        return vectors

    def _packed_pooling(self, batch: TokenBatch) -> torch.Tensor:
        last = self.settings.pooling == "last"
        packing = Packing(batch, self.causal and last, self.device, self.first_position, last)
        # [row, hidden], or [texts, hidden] where the last layer computes no more (`prune_last_layer`)
        hidden = packed_outputs(self.model, batch, packing).last_hidden_state[0]
        return pooled_states(hidden, packing).float() if self.reads_one_token else self._pool_all(hidden, batch)

    def _padded_pooling(self, batch: TokenBatch) -> torch.Tensor:
        inputs = padded_inputs(batch, self.tokenizer.pad_token_id, self.device)
        if self.has_cache:
            inputs["use_cache"] = False
        hidden = self.model(**inputs).last_hidden_state
        first = np.arange(len(batch), dtype=np.int32) * hidden.shape[1]  # token of each text, in all rows
        if self.settings.pooling == "last":
            first = first + batch.lengths - 1
        one_token = self.reads_one_token
        places = on_device(first if one_token else concatenated_ranges(first, batch.lengths), self.device)
        states = hidden.flatten(0, 1)[places]
        return states.float() if one_token else self._pool_all(states, batch)

    def _pool_all(self, states: torch.Tensor, batch: TokenBatch) -> torch.Tensor:
        """states: [tokens, hidden], text after text."""
        settings, suffix = self.settings, len(self.text_encoder.template.suffix)
        for head in self.heads.values():
            if isinstance(head, LatentAttention):
                states = head(states)
        weights = token_weights(settings.pooling, batch, settings.include_prompt, settings.cls_interval, suffix)
        return weighted_sum_of_tokens(states, weights, batch.lengths)

    @cached_property
    def has_cache(self) -> bool:
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
    ) -> "EmbeddingModel":
        """Load a base model or a trained embedding model, on the CPU.

        model_name_or_path: a folder, a hub name, or `package:NAME` for a model inside a Python package. An argument
        that is not given comes from the folder, where it says it. Else pooling is "mean" for an encoder and "last" for
        a decoder, there are no prompts, and vectors are normalized.
        pooling: see `models.pooling`. prompts: text before a text, by name, in place of the folder's of that name.
        max_length: tokens of a text; default as saved, else 512 or the model's limit. query_max_length: of a query;
        default max_length. include_prompt: whether the tokens of a prompt are pooled too. cls_interval: with pooling
        cls, a long text gets another cls after every so many tokens, and their mean is taken. bidirectional: let a
        decoder's tokens see those after them. dims: widths of a Matryoshka model; one beyond the model's own adds a
        projection to it. dtype: of the backbone's weights; default float32.

        Raises ValueError for a reranker, an encoder-decoder, a folder whose modules are not known here, and a
        max_length beyond the model's positions.
        """
        options = options_among(locals(), EmbedderOptions)
        return cls.load(ModelFiles(resolve_model_path(model_name_or_path)), options, dims)

    @classmethod
    def load(
        cls,
        files: ModelFiles,
        options: EmbedderOptions,
        dims: Sequence[int] | None = None,
        trained_only: bool = False,
    ) -> "EmbeddingModel":
        """`from_pretrained` of files that were looked up. trained_only: raise ValueError for a decoder that does not
        say how its vectors are made, and warn of such an encoder."""
        path = files.path
        refuse_reranker(files)
        saved = read_settings(files)
        bidirectional = choose_setting("bidirectional", options.bidirectional, saved.get("bidirectional"), False)
        model, new_parameters = load_model(
            AutoModel,
            path,
            choose_dtype(options.dtype),
            options.trust_remote_code,
            options.attn_implementation,
            {"is_causal": False} if bidirectional else {},
        )
        check_is_no_encoder_decoder(path, model)
        new_parameters = leave_out_pooler(model, new_parameters)
        warn_of_new_parameters(path, new_parameters)
        if bidirectional:
            make_bidirectional(path, model)
        causal = is_causal(model)
        is_decoder = causal or bidirectional
        tokenizer = load_tokenizer(path, options.trust_remote_code)
        lower_case_like(files, tokenizer)
        if is_decoder:
            tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
        else:
            set_encoder_pad_token(model, tokenizer)
        check_vocabulary(path, model, tokenizer)
        saved_length = None
        if is_embedder(files) and files.max_seq_length is not None:
            saved_length = min(files.max_seq_length, position_limit(model) or files.max_seq_length)
        max_length = choose_max_length(
            options.max_length, saved_length, files, tokenizer, model, trained=is_embedder(files)
        )
        tokenizer.model_max_length = max_length  # other libraries truncate by it
        known = known_embedder(files)
        eos_token = known.pop("eos_token", None)
        if not known.keys() <= saved.keys():
            logger.info("%s: known by its name, asked as its card says: %s", path, known)
        defaults = {"pooling": "last" if is_decoder else "mean", "prompts": {}} | known
        if "pooling" not in known.keys() | saved.keys() and options.pooling is None:
            check_pooling_is_known(path, is_decoder, trained_only)
        given = options.given("pooling", "query_max_length", "include_prompt", "cls_interval", "normalize")
        values = defaults | saved
        values |= {name: choose_setting(name, value, saved.get(name), None) for name, value in given.items()}
        values["prompts"] = values["prompts"] | (options.prompts or {})
        values["dims"] = values["dims"] if dims is None else tuple(dims)
        settings = EmbedderSettings(max_length=max_length, **values | {"bidirectional": bidirectional})
        check_settings(path, settings, causal)
        template = text_template(tokenizer)
        if is_decoder and not template.suffix:
            if eos_token is None and (not is_embedder(files) or tokenizer.init_kwargs.get("add_eos_token")):
                eos_token = tokenizer.eos_token
            if eos_token is not None:
                template = append_eos(tokenizer, template, eos_token)
        has_types = template.has_types and "token_type_ids" in inspect.signature(model.forward).parameters
        left = truncates_left(tokenizer, trained=is_embedder(files))
        if settings.cls_interval is not None and len(template.prefix) != 1:
            raise ValueError(f"{path}: cls_interval is for models whose texts begin with one cls token; leave it out")
        template = replace(template, has_types=has_types, cls_interval=settings.cls_interval, truncate_left=left)
        lengths = {"document": max_length, "query": settings.query_max_length or max_length}
        encoder = TextEncoder(tokenizer, template, settings.prompts, lengths, settings.default_prompt)
        heads = {each.folder: load_head(files, each) for each in read_heads(files)}
        new_heads = make_new_heads(settings, model.config.get_text_config().hidden_size, heads)
        for folder in new_heads:
            new_parameters |= {f"heads.{folder}.{name}" for name, _ in heads[folder].named_parameters()}
        return cls(model, encoder, settings, new_parameters, causal, heads, options.attn_implementation)

    def save_pretrained(self, folder: str | Path, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        """Write a Hugging Face folder of the bare model in the layout of sentence-transformers.

        state_dict: weights of this module, where an engine has gathered them; default its own.
        """
        folder, config = Path(folder), self.model.config
        if self.settings.dims:  # so that vLLM lets a request name a width
            config.is_matryoshka, config.matryoshka_dimensions = True, list(self.settings.dims)
        self.save_weights(folder, state_dict)
        heads = [HeadFiles(type(head).saved_as, name, head.saved_values()) for name, head in self.heads.items()]
        write_settings(folder, self.settings, config.get_text_config().hidden_size, heads)
        self.save_heads(folder, self.state_dict() if state_dict is None else state_dict)

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


def load_head(files: ModelFiles, saved: HeadFiles) -> Head:
    """Raises ValueError for an activation that is not known here, and weights that do not fit."""
    where, values = f"{files.path}: {saved.folder}", saved.values
    with parsing(f"{where}/config.json"):
        head = HEADS[saved.kind].of_values(values)
    file = find_file(files.path, f"{saved.folder}/{WEIGHTS}")
    with reading(where):
        if file is not None:
            weights = load_file(file)
        else:
            old = find_file(files.path, f"{saved.folder}/pytorch_model.bin")
            weights = torch.load(old, map_location="cpu", weights_only=True)
        load_weights(head, weights)
    return head


def load_weights(head: Head, weights: dict[str, torch.Tensor]) -> None:
    """weights: as they stand in a file."""
    head.load_state_dict({name.removeprefix(head.name_prefix): value for name, value in weights.items()})


def make_new_heads(settings: EmbedderSettings, width: int, heads: dict[str, Head]) -> list[str]:
    """Add to `heads` what the settings ask for and the folder does not have; the names of those.

    width: of the model's states, or of the vectors that the last of the heads gives.
    """
    before = set(heads)
    if settings.pooling == "latent_attention" and "LatentAttention" not in {each.saved_as for each in heads.values()}:
        heads["1_LatentAttention"] = LatentAttention(width)
    widths = [each.out_features for each in heads.values() if isinstance(each, Projection)]
    width = widths[-1] if widths else width
    if settings.dims and max(settings.dims) > width:
        place = 2 + len(heads)
        heads[f"{place}_Dense"] = Projection(width, max(settings.dims))
        logger.info("a new projection of vectors from %d to %d numbers", width, max(settings.dims))
    return [name for name in heads if name not in before]


def check_settings(path: str, settings: EmbedderSettings, causal: bool) -> None:
    """Raises ValueError for settings that do not fit each other."""
    is_cls = settings.pooling == "cls"
    if causal and is_cls:
        raise ValueError(f"{path}: pooling cls reads the first token, which in a decoder sees no other; give last")
    if settings.cls_interval is not None and not is_cls:
        raise ValueError(f"{path}: cls_interval is for pooling cls, and pooling is {settings.pooling}; leave it out")
    if is_cls and not settings.include_prompt:
        raise ValueError(f"{path}: include_prompt false is for poolings of all tokens, and pooling is cls")


def refuse_reranker(files: ModelFiles) -> None:
    """Raises ValueError for a reranker of any program: its states tell of a pair, not of a text."""
    ours = find_file(files.path, SETTINGS_FILE) is not None
    if ours or files.architecture.endswith(CLASSIFIER) or files.logit_score is not None:
        raise ValueError(
            f"{files.path} is a reranker ({files.architecture}); give an embedding model, or a base model to train one"
        )


def leave_out_pooler(model: PreTrainedModel, new_parameters: set[str]) -> set[str]:
    """BERT's own pooler has no part in a vector: it is kept as it is, untrained, for those who read the folder."""
    if getattr(model, "pooler", None) is not None:
        model.pooler.requires_grad_(False)
    return {name for name in new_parameters if not name.startswith("pooler.")}


def check_is_no_encoder_decoder(path: str, model: PreTrainedModel) -> None:
    if model.config.is_encoder_decoder:
        raise ValueError(f"{path}: a {type(model).__name__} is an encoder-decoder; give an encoder or a decoder")


def is_causal(model: PreTrainedModel) -> bool:
    """Whether a text's first token sees none of those after it."""
    ids = torch.tensor([[0, 1, 2], [0, 1, 3]])
    with evaluating(model):
        first, second = model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state[:, 0]
    return torch.equal(first, second)


def make_bidirectional(path: str, model: PreTrainedModel) -> None:
    """After the configuration said `is_causal: false`, by which transformers masks: our attention asks the layers.

    Raises ValueError for an encoder, and for a decoder that stays causal.
    """
    layers = [module for module in model.modules() if getattr(module, "is_causal", False)]
    for layer in layers:
        layer.is_causal = False
    if not layers or is_causal(model):
        why = "stays causal" if layers else "is no decoder of transformers"
        raise ValueError(f"{path}: bidirectional is for decoders, and a {type(model).__name__} {why}; leave it out")


def check_pooling_is_known(path: str, is_decoder: bool, trained_only: bool) -> None:
    """Of a folder that does not say how it pools, where the caller does not say it either."""
    if not trained_only:
        logger.info("%s does not say how it pools: %s", path, "last token" if is_decoder else "mean")
    elif is_decoder:
        raise ValueError(
            f"{path}: a decoder that does not say how its vectors are made; give pooling, and prompts where it was "
            'trained with some, such as pooling="last", prompts={"query": "..."}'
        )
    else:
        logger.warning("%s does not say how it pools, and is taken to pool by the mean; give pooling", path)


def append_eos(tokenizer: PreTrainedTokenizerBase, template: TextTemplate, eos_token: str) -> TextTemplate:
    """A decoder's text ends with eos, here and, by the tokenizer that is saved, in other libraries."""
    eos_id = tokenizer.convert_tokens_to_ids(eos_token)
    ids = [*template.prefix, eos_id]
    *before, eos = tokenizer.convert_ids_to_tokens(ids)
    single = [*before, "$A", eos]
    pair = [*single, *(f"{part}:1" for part in (*before, "$B", eos))]
    special = list(dict(zip((*before, eos), ids, strict=True)).items())
    fast = tokenizer.backend_tokenizer
    own = fast.post_processor
    fast.post_processor = processors.TemplateProcessing(single, pair, special)
    if own is not None and not before:
        fast.post_processor = processors.Sequence([own, fast.post_processor])
    if {"add_bos_token", "add_eos_token"} & tokenizer.init_kwargs.keys():  # they win over tokenizer.json
        tokenizer.init_kwargs |= {"add_bos_token": bool(before), "add_eos_token": True}
    return replace(template, suffix=(eos_id,))
