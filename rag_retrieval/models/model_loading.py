"""The Hugging Face parts of a reranker, loaded and checked: tokenizer, classifier with one label, limits.

What a reader would get wrong: a base model has no scoring head. Loading it works, with a fresh random head,
and its scores mean nothing until it is trained; hence the warning.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedModel,
)
from transformers.modeling_layers import GenericForSequenceClassification

from rag_retrieval.models.model_files import choose_setting

logger = logging.getLogger(__name__)

DEFAULT_MAX_LENGTH = 512
NAMES_SHOWN = 6  # parameters named in a message; the rest are counted


def load_tokenizer(model_path: str, trust_remote_code: bool):
    """The tokenizer of a folder, padding and cutting at the right.

    Raises ValueError for files that cannot be read, and for a tokenizer without a fast version or without a
    vocabulary.
    """
    # as arguments, because attributes set later are not saved with the tokenizer
    sides = {"padding_side": "right", "truncation_side": "right"}
    with reading(f"{model_path}: its tokenizer"):
        tokenizer = AutoTokenizer.from_pretrained(model_path, trust_remote_code=trust_remote_code, **sides)
    if not tokenizer.is_fast:
        raise ValueError(
            f"{model_path}: its tokenizer ({type(tokenizer).__name__}) has no fast version, which is needed"
        )
    # without its files transformers makes one of special tokens alone, and every word becomes [UNK]
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"{model_path}: its tokenizer knows only special tokens; copy the model's tokenizer files there"
        )
    return tokenizer


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Raise ValueError that names `what` for whatever other libraries raise over files they cannot use.

    That may be KeyError, SafetensorError, ImportError of a missing package and more. The text of their OSError
    says enough without its class, but not always of what: that of a hub that cannot be reached names no model.
    """
    try:
        yield
    except Exception as error:
        reason = " ".join(str(error).split())
        if not isinstance(error, OSError):
            reason = f"{type(error).__name__}: {reason}"
        raise ValueError(f"{what} cannot be loaded ({reason})") from error


def load_classifier(
    model_path: str,
    *,
    num_labels: int,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    attn_implementation: str | None,
) -> tuple[PreTrainedModel, set[str]]:
    """The sequence-classification model with one label, and the names of its newly initialised parameters.

    Weights come in float32 whatever the checkpoint's dtype, unless `dtype` says otherwise: training updates
    float32 weights, and half precision is autocast's business. Raises ValueError for num_labels other than 1,
    for files that cannot be loaded, and for a checkpoint whose weights do not fit.
    """
    check_num_labels(num_labels)
    options = (dtype, trust_remote_code, attn_implementation)
    return load_model(AutoModelForSequenceClassification, model_path, *options, {"num_labels": 1})


def load_causal_model(
    model_path: str,
    *,
    num_labels: int,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    attn_implementation: str | None,
) -> PreTrainedModel:
    """The causal language model with its output embedding; weights, dtype and errors as in `load_classifier`.

    Raises ValueError for an encoder, and for a checkpoint without an output embedding.
    """
    check_num_labels(num_labels)
    with reading(f"{model_path}: the model"):
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
    if getattr(config, "is_decoder", None) is False:  # such families are decoders on request
        name = config.model_type
        raise ValueError(f"{model_path} is a {name}, an encoder; head: yes_no needs a causal language model")
    options = (dtype, trust_remote_code, attn_implementation)
    model, new_parameters = load_model(AutoModelForCausalLM, model_path, *options, {})
    if new_parameters:
        raise ValueError(
            f"{model_path}: head: yes_no reads the output embedding of a causal language model, and it has no "
            f"{shorten(sorted(new_parameters))}; use head: scalar, or give a model that was saved as a causal one"
        )
    return model


def check_num_labels(num_labels: int) -> None:
    if num_labels != 1:
        raise ValueError(f"num_labels must be 1, found {num_labels}: a reranker gives one score for a pair")


def load_model(
    auto_class,
    model_path: str,
    dtype: torch.dtype | None,
    trust_remote_code: bool,
    attn_implementation: str | None,
    configuration: dict,
) -> tuple[PreTrainedModel, set[str]]:
    """The model of one of transformers' auto classes and the names of its new parameters, checked.

    configuration: attributes set on the checkpoint's configuration before the model is made.
    """
    with reading(f"{model_path}: the model"):
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        for name, value in configuration.items():
            setattr(config, name, value)
        model, loading = auto_class.from_pretrained(
            model_path,
            config=config,
            dtype=dtype or torch.float32,
            trust_remote_code=trust_remote_code,
            attn_implementation=attn_implementation,
            ignore_mismatched_sizes=True,  # refused below, in one sentence
            output_loading_info=True,
        )
    new_parameters = {name for name, _ in model.named_parameters() if name in loading["missing_keys"]}
    check_weights(model_path, model, new_parameters, loading["mismatched_keys"])
    own_memory(model)
    return model, new_parameters


def check_weights(model_path: str, model: PreTrainedModel, new_parameters: set[str], mismatched) -> None:
    """ValueError when the checkpoint's weights are not this model's: another head, or other names."""
    if mismatched:
        shapes = [
            f"{name} is {list(found)}, needed {list(needed)}" for name, found, needed in sorted(mismatched)
        ]
        raise ValueError(
            f"{model_path}: weights do not fit a reranker with one label: {shorten(shapes)}. Use a base "
            "model without a classification head, or one that was trained with num_labels 1"
        )
    embeddings = model.get_input_embeddings().weight
    if any(
        parameter is embeddings and name in new_parameters for name, parameter in model.named_parameters()
    ):
        raise ValueError(
            f"{model_path}: no weights of a {type(model).__name__} in it, only other names; missing are "
            f"{shorten(sorted(new_parameters))}. Was it saved by another program or as another model type?"
        )


def own_memory(model: PreTrainedModel) -> None:
    """Give parameters on the CPU memory of their own, aligned alike after every load.

    They come as views of the mapped safetensors file. Its offsets differ from file to file, other addresses
    make other kernels run, and a saved copy then scored up to 2e-7 differently (measured on tiny models).
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def warn_of_new_parameters(model_path: str, new_parameters: set[str]) -> None:
    if new_parameters:
        names = shorten(sorted(new_parameters))
        logger.warning(
            "%s has no trained %s: random for now, so train before you use its scores", model_path, names
        )


def shorten(names: list[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether the score is read at the last token (causal families) and not at the first."""
    return isinstance(model, GenericForSequenceClassification) or isinstance(
        getattr(model, "score", None), nn.Linear
    )


def choose_max_length(given: int | None, saved: int | None, model: PreTrainedModel) -> int:
    """Tokens per pair: the argument, else what was saved, else 512 or the model's limit if that is less.

    Raises ValueError beyond the model's limit.
    """
    default = min(DEFAULT_MAX_LENGTH, position_limit(model) or DEFAULT_MAX_LENGTH)
    max_length = choose_setting("max_length", given, saved, default)
    check_max_length(max_length, model)
    return max_length


def check_max_length(max_length: int, model: PreTrainedModel) -> None:
    limit = position_limit(model)
    if limit is not None and max_length > limit:
        raise ValueError(
            f"max_length {max_length} is more than the {limit} tokens that this model has positions for"
        )


def position_limit(model: PreTrainedModel) -> int | None:
    """The longest input in tokens that the model has positions for; None where nothing bounds it."""
    config = model.config.get_text_config()
    limit = getattr(config, "max_position_embeddings", None)
    # DeBERTa with relative positions alone has no table that could run out
    if limit is None or limit < 1 or getattr(config, "position_biased_input", True) is False:
        return None
    return limit - first_position(model)


def first_position(model: PreTrainedModel) -> int:
    """The number of a text's first position: RoBERTa and XLM-RoBERTa count from padding_idx + 1, others from 0."""
    embeddings = getattr(getattr(model.base_model, "embeddings", None), "position_embeddings", None)
    padding_idx = getattr(embeddings, "padding_idx", None)
    return 0 if padding_idx is None else padding_idx + 1
