"""The Hugging Face parts of a reranker, loaded and checked: tokenizer, weights, pad token, limits.

A base model has no score head. transformers loads it with a random one, and its scores mean nothing until it is
trained; `load_model` returns the names of such parameters, and the callers warn or refuse.
"""

import importlib.util
import logging
import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from tokenizers import normalizers
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from rag_retrieval.core.log import quiet_transformers
from rag_retrieval.models.settings import (
    CLASSIFIER,
    ModelFiles,
    check_no_pointers,
    choose_setting,
    parsing,
    read_json,
)

logger = logging.getLogger(__name__)
quiet_transformers()

DEFAULT_MAX_LENGTH = 512
LONGEST_DEFAULT = 8192  # tokens that a foreign folder's limit sets; more is a language model's context, and asked for
NO_LIMIT = 10**9  # tokenizers without a limit say 10**30
NAMES_SHOWN = 6  # parameters named in a message; the rest are counted
NEW_PAD_TOKEN = "<|pad|>"
SENTENCEPIECE_FILES = ("spm.model", "sentencepiece.bpe.model", "spiece.model", "tokenizer.model")


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


# ---- tokenizer ------------------------------------------------------------------------------------------


def load_tokenizer(
    model_path: str, trust_remote_code: bool, split_special_tokens: bool | None = None
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder, padding at the right.

    split_special_tokens: whether special tokens inside a text are plain text; None: as the folder says, else not.
    Raises ValueError for files that cannot be read, and for a tokenizer without a fast version or without a
    vocabulary.
    """
    check_no_pointers(model_path)
    check_sentencepiece(Path(model_path))
    with reading(f"{model_path}: its tokenizer"):
        # as an argument, because an attribute set later is not saved with the tokenizer. Whatever side a folder says,
        # padding changes no score here: the attention mask hides it, and scores are read at a pair's own tokens
        options = {} if split_special_tokens is None else {"split_special_tokens": split_special_tokens}
        tokenizer = AutoTokenizer.from_pretrained(
            model_path, trust_remote_code=trust_remote_code, padding_side="right", **options
        )
    if not tokenizer.is_fast:
        raise ValueError(
            f"{model_path}: its tokenizer ({type(tokenizer).__name__}) has no fast version, which is needed"
        )
    # without its files transformers makes one of special tokens alone, and every word becomes [UNK]
    if tokenizer.get_vocab().keys() <= set(tokenizer.all_special_tokens):
        raise ValueError(
            f"{model_path}: its tokenizer knows only special tokens; copy the model's tokenizer files there"
        )
    warn_of_other_class(model_path, tokenizer)
    return tokenizer


def warn_of_other_class(model_path: str, tokenizer: PreTrainedTokenizerBase) -> None:
    """transformers reads the files with another class, without a word, where it does not know the one they name."""
    settings = read_json(model_path, "tokenizer_config.json")
    named = settings.get("tokenizer_class")
    if named and "auto_map" not in settings and tokenizer_class_from_name(named.removesuffix("Fast")) is None:
        logger.warning(
            "%s: tokenizer_class %s of tokenizer_config.json is not in transformers; its files are read as a %s, "
            "which may give other tokens. Correct the name, or update transformers",
            model_path, named, type(tokenizer).__name__,
        )  # fmt: skip


def check_sentencepiece(folder: Path) -> None:
    """Raises ValueError where the vocabulary is a SentencePiece file alone and the package that reads it is missing."""
    files = [name for name in SENTENCEPIECE_FILES if (folder / name).is_file()]
    if files and not (folder / "tokenizer.json").is_file() and importlib.util.find_spec("sentencepiece") is None:
        raise ValueError(
            f"{folder}: its tokenizer is {files[0]} without tokenizer.json; to read it, run: pip install "
            "sentencepiece protobuf"
        )


def truncates_left(tokenizer: PreTrainedTokenizerBase, trained: bool) -> bool:
    """Whether long documents lose their beginning: as the tokenizer of a trained model says; a new one reads it."""
    if not trained:
        tokenizer.truncation_side = tokenizer.init_kwargs["truncation_side"] = "right"  # the latter is saved
    return tokenizer.truncation_side == "left"


def lower_case_like(files: ModelFiles, tokenizer: PreTrainedTokenizerBase) -> None:
    """Let the tokenizer lower its texts where sentence-transformers does (do_lower_case)."""
    own = tokenizer.backend_tokenizer.normalizer
    if files.transformer_options.get("do_lower_case") is True and "Lowercase" not in repr(own):
        steps = [normalizers.Lowercase(), own] if own is not None else [normalizers.Lowercase()]
        tokenizer.backend_tokenizer.normalizer = normalizers.Sequence(steps)


def check_vocabulary(model_path: str, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ValueError where the tokenizer gives ids that the embedding has no row for."""
    rows = model.get_input_embeddings().num_embeddings
    beyond = sorted((place, token) for token, place in tokenizer.get_vocab().items() if place >= rows)
    if beyond:
        named = shorten([f"{token!r} ({place})" for place, token in beyond])
        raise ValueError(
            f"{model_path}: its tokenizer has tokens beyond the {rows} rows of the model's embedding: {named}; give "
            "the tokenizer that the model was saved with, or resize the embedding with resize_token_embeddings and save"
        )


# ---- pad token ------------------------------------------------------------------------------------------


def set_decoder_pad_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, scoring_token_id: int
) -> None:
    """A pad token that is not the token where the score is read.

    transformers' own decoder heads read it at the last token that is not the pad token. Taken in turn: the
    tokenizer's pad, eos or unk token, another special token, or a new one.
    """
    named = [tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token]
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    usable = [
        token
        for token in named + added
        if token and tokenizer.convert_tokens_to_ids(token) not in (None, scoring_token_id)
    ]
    if usable:
        tokenizer.pad_token = usable[0]
    else:
        add_pad_token(model, tokenizer)
    set_config_pad_token(model, tokenizer.pad_token_id)


def set_encoder_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The config's pad token where it names one that the tokenizer has, else the tokenizer's, else a new one.

    The config goes first: RoBERTa's positions count from it.
    """
    known = getattr(model.config.get_text_config(), "pad_token_id", None)  # a remote configuration may lack it
    token = None if known is None or known < 0 else tokenizer.convert_ids_to_tokens(known)
    if token is not None:
        tokenizer.pad_token = token
    elif tokenizer.pad_token is None:
        add_pad_token(model, tokenizer)
    set_config_pad_token(model, tokenizer.pad_token_id)


def add_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_special_tokens({"pad_token": NEW_PAD_TOKEN})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    logger.info("the tokenizer has no token to pad with: added %s", NEW_PAD_TOKEN)


def set_config_pad_token(model: PreTrainedModel, pad_token_id: int) -> None:
    model.config.get_text_config().pad_token_id = pad_token_id
    model.config.pad_token_id = pad_token_id


# ---- weights --------------------------------------------------------------------------------------------


def load_classifier(
    model_path: str, dtype: torch.dtype | None, trust_remote_code: bool, attn_implementation: str | None = None
) -> tuple[PreTrainedModel, set[str]]:
    """The sequence-classification model with one label, and the names of its newly initialised parameters.

    Weights come in float32 whatever the checkpoint's dtype, unless `dtype` says otherwise: training updates
    float32 weights, and half precision is autocast's business. Raises ValueError for files that cannot be
    loaded, and for a checkpoint whose weights do not fit.
    """
    options = (dtype, trust_remote_code, attn_implementation)
    return load_model(AutoModelForSequenceClassification, model_path, *options, {"num_labels": 1})


def load_causal_model(
    model_path: str, dtype: torch.dtype | None, trust_remote_code: bool, attn_implementation: str | None = None
) -> PreTrainedModel:
    """The causal language model with its output embedding; weights, dtype and errors as in `load_classifier`.

    Raises ValueError for an encoder, and for a checkpoint without an output embedding.
    """
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
    check_no_pointers(model_path)
    with reading(f"{model_path}: the model"):
        config = AutoConfig.from_pretrained(model_path, trust_remote_code=trust_remote_code)
        for name, value in configuration.items():
            setattr(config, name, value)
        check_chunks(config)
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
    check_unused_weights(model_path, model, loading["unexpected_keys"])
    own_memory(model)
    return model, new_parameters


def check_chunks(config: PreTrainedConfig) -> None:
    """Raises ValueError for feed-forward layers in chunks: of a length that the chunks do not divide, no score."""
    chunk = getattr(config, "chunk_size_feed_forward", 0)
    if chunk > 1:
        raise ValueError(
            f"chunk_size_feed_forward is {chunk}, which saves memory but takes only lengths that are its multiples; "
            "set it to 0 in config.json, which changes no score"
        )


def check_weights(model_path: str, model: PreTrainedModel, new_parameters: set[str], mismatched) -> None:
    """ValueError when the checkpoint's weights are not this model's: another head, or other names."""
    if mismatched:
        shapes = [
            f"{name} is {list(saved)}, needed {list(needed)}" for name, saved, needed in sorted(mismatched)
        ]
        what, advice = f"the {type(model).__name__} of its config.json", "Save the model again"
        if type(model).__name__.endswith(CLASSIFIER):
            what = "a reranker with one label"
            advice = "Use a base model without a classification head, or one that was trained with num_labels 1"
        raise ValueError(f"{model_path}: weights do not fit {what}: {shorten(shapes)}. {advice}")
    embeddings = model.get_input_embeddings().weight
    if any(
        parameter is embeddings and name in new_parameters for name, parameter in model.named_parameters()
    ):
        raise ValueError(
            f"{model_path}: no weights of a {type(model).__name__} in it, only other names; missing are "
            f"{shorten(sorted(new_parameters))}. Was it saved by another program or as another model type?"
        )


def check_unused_weights(model_path: str, model: PreTrainedModel, unused: Iterable[str]) -> None:
    """Raises ValueError for weights of layers that the configuration leaves out.

    Other unused weights are normal: heads of masked or causal language modelling, a pooler, position numbers.
    """
    own = {without_numbers(name) for name, _ in model.named_parameters()}
    has_layers = any(is_of_layer(name) for name, _ in model.named_parameters())
    prefix = f"{model.base_model_prefix}."
    layers = [
        name
        for name in sorted(unused)
        if is_of_layer(name)
        and (not has_layers or without_numbers(name) in own or without_numbers(prefix + name) in own)
    ]
    if layers:
        raise ValueError(
            f"{model_path}: config.json describes fewer layers than the weights have, and these would not be used: "
            f"{shorten(layers)}; correct num_hidden_layers, or save the smaller model with its own weights"
        )


def is_of_layer(name: str) -> bool:
    return re.search(r"\.\d+\.", f".{name}") is not None


def without_numbers(name: str) -> str:
    return re.sub(r"(?<=\.)\d+(?=\.)", "N", name)


def own_memory(model: PreTrainedModel) -> None:
    """Copy parameters on the CPU into newly allocated memory, which is aligned alike after every load.

    They come as views of the mapped safetensors file. Its offsets differ from file to file, other addresses
    make other kernels run, and a saved copy then scored up to 2e-7 differently (measured on tiny models).
    """
    for parameter in model.parameters():
        if parameter.device.type == "cpu":
            parameter.data = parameter.data.clone()


def warn_of_new_parameters(model_path: str, new_parameters: set[str]) -> None:
    if new_parameters:
        names = shorten(sorted(new_parameters))
        logger.warning("%s has no trained %s: random for now, so train before you use its scores", model_path, names)


def check_is_trained(model_path: str, new_parameters: set[str]) -> None:
    """Raises ValueError where parameters were not in the checkpoint."""
    if new_parameters:
        raise ValueError(
            f"{model_path}: no trained head in it ({shorten(sorted(new_parameters))} would be random); is it an "
            "embedding model or a base model? Give a reranker, or train one from it: rag-retrieval train"
        )


def check_numbers(model_path: str, model: PreTrainedModel) -> None:
    """Raises ValueError for weights with NaN or infinity: sums in float32, which one of them makes the same."""
    for name, tensor in model.named_parameters():
        if not torch.isfinite(tensor.detach().sum(dtype=torch.float32)):
            raise ValueError(
                f"{model_path}: the weights {name} are not all finite numbers; the training may have failed. Give "
                "another checkpoint"
            )


def shorten(names: list[str]) -> str:
    rest = len(names) - NAMES_SHOWN
    return ", ".join(names[:NAMES_SHOWN]) + (f" and {rest} more" if rest > 0 else "")


# ---- what a model is ------------------------------------------------------------------------------------


def is_decoder(model: PreTrainedModel) -> bool:
    """Whether the score is read at the last token (causal families) and not at the first."""
    return isinstance(model, GenericForSequenceClassification) or isinstance(
        getattr(model, "score", None), nn.Linear
    )


def model_type_of(path: str, trust_remote_code: bool) -> str:
    """Of a folder that does not say it: "llm_decoder" or "bert_encoder", by its class of transformers."""
    with reading(f"{path}: the model"), torch.device("meta"):
        config = AutoConfig.from_pretrained(path, trust_remote_code=trust_remote_code)
        model = AutoModelForSequenceClassification.from_config(config, trust_remote_code=trust_remote_code)
    return "llm_decoder" if is_decoder(model) else "bert_encoder"


def score_layer(model: PreTrainedModel) -> nn.Linear | None:
    """The layer that gives the score: the last one with one output that is not the backbone's own.

    A mixture of experts has layers with one output in its backbone too, which gate the experts.
    """
    backbone = set(model.base_model.modules()) if model.base_model is not model else set()
    heads = [
        module
        for module in model.modules()
        if isinstance(module, nn.Linear) and module.out_features == 1 and module not in backbone
    ]
    return heads[-1] if heads else None


def choose_max_length(
    given: int | None,
    saved: int | None,
    files: ModelFiles,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    trained: bool,
) -> int:
    """Tokens per pair, or per text of an embedder: the argument, else what was saved with the model, else what other
    programs wrote, else 512.

    Of others: sentence-transformers' max_seq_length, else the tokenizer's model_max_length, for a trained model and
    up to LONGEST_DEFAULT. What is not given is bounded by the model's positions; it is logged which one holds. Raises
    ValueError for a given or saved one beyond them.
    """
    limit = position_limit(model) or NO_LIMIT
    theirs = [
        (files.max_seq_length, "max_seq_length of sentence_bert_config.json"),
        (tokenizer.model_max_length, "model_max_length of its tokenizer"),
    ]
    with parsing(f"{files.path}: tokenizer_config.json"):
        known = [(value, source) for value, source in theirs if value is not None and 0 < value < NO_LIMIT]
    default, source = DEFAULT_MAX_LENGTH, "the default"
    if known and trained:
        default, source = min(known[0][0], LONGEST_DEFAULT), known[0][1]
    max_length = choose_setting("max_length", given, saved, min(default, limit))
    if given is not None or saved is not None:
        source = "as configured" if given is not None else "as it was saved"
    check_max_length(max_length, model)
    logger.info("%s: at most %d tokens (%s)", files.path, max_length, source)
    return int(max_length)


def check_max_length(max_length: int, model: PreTrainedModel, name: str = "max_length") -> None:
    limit = position_limit(model)
    if limit is not None and max_length > limit:
        raise ValueError(f"{name} {max_length} is more than the {limit} tokens that this model has positions for")


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
