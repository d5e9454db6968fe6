"""One pad token that tokenizer and config agree on.

What a reader would get wrong: the pad token is not harmless. transformers' own decoder heads read the score
at the last token that differs from it, and RoBERTa numbers its positions from `config.pad_token_id`.
"""

import logging

from transformers import PreTrainedModel, PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

NEW_PAD_TOKEN = "<|pad|>"


def set_decoder_pad_token(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, scoring_token_id: int
) -> None:
    """A pad token that is not the token where the score is read: transformers then reads it there too.

    Taken in turn: the tokenizer's pad, eos or unk token, another special token, or a new one.
    """
    named = [tokenizer.pad_token, tokenizer.eos_token, tokenizer.unk_token]
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    usable = [
        token for token in named + added if token and is_other_token(tokenizer, token, scoring_token_id)
    ]
    if usable:
        tokenizer.pad_token = usable[0]
    else:
        add_pad_token(model, tokenizer)
    set_config_pad_token(model, tokenizer.pad_token_id)


def set_encoder_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    """The config's pad token where it names one that the tokenizer has, else the tokenizer's, else a new one.

    The config goes first: positions may count from it. The attention mask hides padding, so any token does.
    """
    known = model.config.get_text_config().pad_token_id
    token = None if known is None or known < 0 else tokenizer.convert_ids_to_tokens(known)
    if token is not None:
        tokenizer.pad_token = token
    elif tokenizer.pad_token is None:
        add_pad_token(model, tokenizer)
    set_config_pad_token(model, tokenizer.pad_token_id)


def is_other_token(tokenizer: PreTrainedTokenizerBase, token: str, scoring_token_id: int) -> bool:
    return tokenizer.convert_tokens_to_ids(token) not in (None, scoring_token_id)


def add_pad_token(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
    tokenizer.add_special_tokens({"pad_token": NEW_PAD_TOKEN})
    if len(tokenizer) > model.get_input_embeddings().num_embeddings:
        model.resize_token_embeddings(len(tokenizer))
    logger.info("the tokenizer has no token to pad with: added %s", NEW_PAD_TOKEN)


def set_config_pad_token(model: PreTrainedModel, pad_token_id: int) -> None:
    model.config.get_text_config().pad_token_id = pad_token_id
    model.config.pad_token_id = pad_token_id
