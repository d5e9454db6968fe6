"""The text around a pair for a causal model that answers yes or no, from its chat template, and the two answers.

What a reader would get wrong: a chat template may refuse a system's message, or trim or leave out what it is given, so
its text counts only where the whole question stands in it.
"""

import re

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from rag_retrieval.models.decoder_template import INSTRUCTION
from rag_retrieval.models.yes_no_prompts import ANSWERS, PLACES, PROMPTS, QWEN3_CHAT, QWEN3_MARKUP, check_places


def chat_formats(tokenizer: PreTrainedTokenizerBase, system: str, user: str) -> dict[str, str]:
    """The four format settings of an LLMDecoder for a system text and a user text with {query} and {document}.

    They are laid out by the tokenizer's chat template, thinking switched off, up to where the answer begins; or,
    where it has no template for such messages but Qwen3's markup, as Qwen3 does. Raises ValueError where it has
    neither, and for a user text without the two places in this order.
    """
    check_places(user)
    text = by_chat_template(tokenizer, system, user)
    if text is None and set(QWEN3_MARKUP) <= tokenizer.get_vocab().keys():
        text = QWEN3_CHAT.replace("{system}", system).replace("{user}", user)
    if text is None:
        raise ValueError(
            "the tokenizer has no chat template that takes a system and a user message; give query_format, "
            "document_format, seq and special_token"
        )
    before, between, after = re.split(r"\{query\}|\{document\}", text)
    return {"query_format": before + "{}", "document_format": "{}", "seq": between, "special_token": after}


def by_chat_template(tokenizer: PreTrainedTokenizerBase, system: str, user: str) -> str | None:
    """The chat up to where the answer begins, with the places in it; None where the template gives no such text."""
    if not tokenizer.chat_template:
        return None
    in_one = [{"role": "user", "content": f"{system}\n\n{user}" if system else user}]
    own_role = [{"role": "system", "content": system}, {"role": "user", "content": user}]
    for messages in (own_role, in_one) if system else (in_one,):  # some families refuse a system message
        try:
            text = tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=True, enable_thinking=False
            )
        except TemplateError:
            continue
        if system in text and [text.count(place) for place in PLACES] == [1, 1]:
            return text
    return None


def default_formats(tokenizer: PreTrainedTokenizerBase) -> dict[str, str]:
    prompt = PROMPTS["en"]
    return chat_formats(tokenizer, prompt.system, prompt.user)


def check_instruction(formats: dict[str, str], instruction: str | None) -> None:
    """Raises ValueError for an instruction that no format has a place for."""
    if instruction is not None and not any(INSTRUCTION in text for text in formats.values()):
        raise ValueError(
            "an instruction is given, but neither query_format nor document_format has {instruction}, where it "
            "would stand; add it or leave the instruction out"
        )


def answer_tokens(tokenizer: PreTrainedTokenizerBase, yes_token: str, no_token: str) -> tuple[int, int | None]:
    """The ids of the two answers; None for a no_token of "", where yes is read alone. Raises ValueError unless each
    is one token, other than the other."""
    ids = [single_token(tokenizer, text) for text in (yes_token, no_token)]
    for name, text, token in zip(("yes_token", "no_token"), (yes_token, no_token), ids, strict=True):
        if token is None and (name, text) != ("no_token", ""):
            pieces = tokenizer.tokenize(text)
            raise ValueError(
                f"{name} {text!r} must be one token, and this tokenizer makes {len(pieces)} of it "
                f"({', '.join(pieces)}); {alternatives(tokenizer)}"
            )
    if ids[0] == ids[1]:
        raise ValueError(f"yes_token {yes_token!r} and no_token {no_token!r} are the same token; give two answers")
    return ids[0], ids[1]


def single_token(tokenizer: PreTrainedTokenizerBase, text: str) -> int | None:
    """The id of a text that is exactly one known token."""
    ids = tokenizer.encode(text, add_special_tokens=False)
    return ids[0] if len(ids) == 1 and ids[0] != tokenizer.unk_token_id else None


def alternatives(tokenizer: PreTrainedTokenizerBase) -> str:
    usable = [
        f"{yes!r} and {no!r}"
        for yes, no in ANSWERS
        if None not in (single_token(tokenizer, yes), single_token(tokenizer, no))
    ]
    return f"one token each here: {', '.join(usable)}" if usable else "give two answers that are one token each"
