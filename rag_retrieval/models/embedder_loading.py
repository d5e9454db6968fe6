"""Parts of opening an embedding model: its backbone, what its texts are put into, the heads of its representations."""

import inspect
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import (
    MODEL_FOR_MASKED_LM_MAPPING,
    AutoConfig,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForMaskedLM,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from rag_retrieval.models.devices import choose_dtype
from rag_retrieval.models.embedding_files import (
    EmbedderSettings,
    check_pooling_is_known,
    check_settings,
    choose_settings,
    is_embedder,
    known_embedder,
    read_settings,
)
from rag_retrieval.models.embedding_heads import Head, Projection, check_sizes, load_head, load_token_heads, read_heads
from rag_retrieval.models.lexical import check_logits
from rag_retrieval.models.loading import (
    check_max_length,
    check_vocabulary,
    choose_max_length,
    load_model,
    load_tokenizer,
    lower_case_like,
    position_limit,
    reading,
    set_encoder_pad_token,
    shorten,
    truncates_left,
    warn_of_new_parameters,
)
from rag_retrieval.models.multi_vector import add_prompt_tokens, expansion_token, keep_prompts_whole
from rag_retrieval.models.options import EmbedderOptions
from rag_retrieval.models.representation_files import (
    COLBERT_DIM,
    SPLADE,
    RepresentationOptions,
    choose_representations,
)
from rag_retrieval.models.representations import DENSE, LEXICAL, MULTI_VECTOR
from rag_retrieval.models.scoring import evaluating
from rag_retrieval.models.settings import CLASSIFIER, SETTINGS_FILE, ModelFiles, choose_setting, find_file, read_json
from rag_retrieval.models.text_encoding import TextEncoder, TextTemplate, append_eos, text_template

logger = logging.getLogger(__name__)


class EmbedderParts(NamedTuple):
    """The arguments of `EmbeddingModel`."""

    model: PreTrainedModel
    text_encoder: TextEncoder
    settings: EmbedderSettings
    new_parameters: set[str]
    causal: bool
    heads: dict[str, Head]
    token_heads: dict[str, nn.Module]


def load_parts(
    files: ModelFiles,
    options: EmbedderOptions,
    wanted: RepresentationOptions,
    dims: Sequence[int] | None,
    trained_only: bool,
    cut_lengths: bool,
) -> EmbedderParts:
    """See `EmbeddingModel.load`."""
    path, trained = files.path, is_embedder(files)
    refuse_reranker(files)
    saved, known = read_settings(files), known_embedder(files)
    if not {"pooling", "prompts"} & known.keys() <= saved.keys():
        logger.info("%s: as the card of the model of its name says: %s", path, known)
    saved |= choose_representations(known | saved | options.given("query_max_length"), wanted)
    model, new_parameters, bidirectional = load_backbone(files, options, saved, trained_only)
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
    saved_length = saved.pop("max_length", files.max_seq_length) if trained else None
    if saved_length is not None:
        saved_length = min(saved_length, limit or saved_length)
    max_length = choose_max_length(options.max_length, saved_length, files, tokenizer, model, trained)
    tokenizer.model_max_length = max_length  # other libraries truncate by it
    if "pooling" not in known | saved and options.pooling is None and DENSE in saved["representations"]:
        check_pooling_is_known(path, is_decoder, trained_only)
    values = known | saved
    if options.pooling is None:
        values.setdefault("pooling", "last" if is_decoder else "mean")
    eos_token = values.pop("eos_token", None)
    settings = choose_settings(values, options, dims, max_length=max_length, bidirectional=bidirectional)
    check_settings(path, settings, causal)
    if settings.query_max_length is not None:
        check_max_length(settings.query_max_length, model, "query_max_length")
    if settings.is_colbert:
        keep_prompts_whole(tokenizer, settings.prompts.values())
        add_prompt_tokens(model, tokenizer, settings.prompts.values())
    template = choose_template(files, tokenizer, settings, is_decoder, eos_token)
    if "token_type_ids" not in inspect.signature(model.base_model.forward).parameters:
        template = replace(template, has_types=False)
    encoder = TextEncoder(tokenizer, template, settings.prompts, settings.max_lengths, settings.default_prompt)
    heads = {}
    if DENSE in settings.representations:
        heads = {each.folder: load_head(files, each) for each in read_heads(files)}
    width = model.config.get_text_config().hidden_size
    token_heads, new_heads = choose_token_heads(files, settings, width, wanted.colbert_dim, trained_only)
    return EmbedderParts(model, encoder, settings, new_parameters | new_heads, causal, heads, token_heads)


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
    files: ModelFiles, options: EmbedderOptions, saved: Mapping[str, Any], trained_only: bool
) -> tuple[PreTrainedModel, set[str], bool]:
    """The model, the names of its new parameters, and whether it is a decoder made bidirectional.

    saved: fields of EmbedderSettings. With SPLADE the model has its language modelling head, else none. BERT's own
    pooler has no part in a vector: it is kept as it is, untrained, for those who read the folder. Raises
    ValueError for an encoder-decoder, with trained_only for new parameters, and for `bidirectional` of a model that is
    no decoder, or stays causal.
    """
    path, saved_as_bidirectional = files.path, saved.get("bidirectional", False)
    splade = saved["lexical"] == SPLADE
    bidirectional = choose_setting("bidirectional", options.bidirectional, saved_as_bidirectional or None, False)
    attention = {"is_causal": not bidirectional} if bidirectional or saved_as_bidirectional else {}
    model, new_parameters = load_model(
        language_model_class(path, options.trust_remote_code) if splade else AutoModel,
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
    if splade:
        check_logits(path, model)
    return model, new_parameters, bidirectional and is_decoder


def language_model_class(path: str, trust_remote_code: bool) -> type:
    """Of transformers: masked for encoders, causal for decoders."""
    with reading(f"{path}: the model"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
    by_code = getattr(config, "auto_map", None) or {}
    masked = type(config) in MODEL_FOR_MASKED_LM_MAPPING or "AutoModelForMaskedLM" in by_code
    return AutoModelForMaskedLM if masked else AutoModelForCausalLM


def is_causal(model: PreTrainedModel) -> bool:
    """Whether a text's first token sees none of those after it."""
    ids = torch.tensor([[0, 1, 2], [0, 1, 3]])
    with evaluating(model):
        states = model.base_model(input_ids=ids, attention_mask=torch.ones_like(ids)).last_hidden_state
    first, second = states[:, 0]
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
    if settings.query_expansion:
        token, length = expansion_token(path, tokenizer), settings.max_lengths["query"]
        template = replace(template, expansion_token=token, expanded_length=length)
    left = truncates_left(tokenizer, trained)
    return replace(template, cls_interval=settings.cls_interval, truncate_left=left)


def choose_token_heads(
    files: ModelFiles, settings: EmbedderSettings, width: int, colbert_dim: int | None, trained_only: bool
) -> tuple[dict[str, nn.Module], set[str]]:
    """Those of the folder and new ones, by the name of their representation, and the names of new parameters.

    Raises ValueError for a colbert_dim that is not that of the folder, with trained_only for heads that are not there,
    and for token vectors of several layers, for which BGE-M3's files have no place, beside other representations.
    """
    wanted = [name for name in settings.representations if name != DENSE]
    if settings.lexical == SPLADE:
        wanted.remove(LEXICAL)
    heads = {name: head for name, head in load_token_heads(files).items() if name in wanted}
    check_sizes(files.path, heads, width)
    missing = [name for name in wanted if name not in heads]
    if missing and trained_only:
        raise ValueError(f"{files.path}: it lacks the weights of {', '.join(missing)}; copy the model again")
    for name in missing:
        if name == LEXICAL:
            heads[name] = Projection(width, 1)
        else:
            size = colbert_dim or (COLBERT_DIM if settings.is_colbert else width)
            heads[name] = nn.Sequential(Projection(width, size, bias=not settings.is_colbert))
    of_tokens = heads.get(MULTI_VECTOR, ())
    if len(of_tokens) > 1 and not settings.is_colbert:
        raise ValueError(
            f"{files.path}: its token vectors come from {len(of_tokens)} layers, which cannot be saved beside other "
            "representations; give representations multi_vector"
        )
    size = of_tokens[-1].out_features if len(of_tokens) else None
    if size is not None and colbert_dim not in (None, size):
        raise ValueError(f"{files.path}: its token vectors have {size} numbers, and colbert_dim is {colbert_dim}")
    new = {f"token_heads.{name}.{key}" for name in missing for key, _ in heads[name].named_parameters()}
    if missing:
        logger.info("%s: new heads of %s", files.path, " and ".join(missing))
    return {name: heads[name] for name in wanted}, new
