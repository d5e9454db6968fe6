"""The text around a pair for a causal model that answers yes or no: from its chat template, as formats and as ids.

What a reader would get wrong: the tokens must be those of the whole text in one go, or scores drift from those of
the model's own code. So the text is cut into parts only where tokenizers cut it anyway: before the last line that
leads to the query or the document, and after the white space that follows them.
"""

import re

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from rag_retrieval.models.pair_encoding import PairTemplate, bare, split_format, tokenize, tokenize_after
from rag_retrieval.models.yes_no_prompts import ANSWERS, PLACES, PROMPTS, QWEN3_CHAT, QWEN3_MARKUP, check_places

INSTRUCTION = "{instruction}"


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


def yes_no_template(
    tokenizer: PreTrainedTokenizerBase,
    query_format: str,
    document_format: str,
    seq: str,
    special_token: str,
    instruction: str,
) -> PairTemplate:
    """The parts of `[bos] query_format + seq + document_format + special_token`, `{instruction}` filled in.

    All but the two texts is kept whole when a pair is cut. bos is added where the family has one and the text does
    not bring it.
    """
    before_query, after_query = split_format("query_format", query_format)
    before_document, after_document = split_format("document_format", document_format)
    between, after = after_query + seq + before_document, after_document + special_token
    before_query, between, after = (text.replace(INSTRUCTION, instruction) for text in (before_query, between, after))
    prefix, before_query = split_last_line(before_query)
    query_end, between = split_white_space(between)
    middle, before_document = split_last_line(between)
    document_end, suffix = split_white_space(after)
    own = bare(tokenizer)
    anchor = anchor_of(own, tokenizer.all_special_tokens) if prefix else ""
    parts = tokenize(own, [prefix])
    parts += tokenize_after(anchor, own, [middle, suffix, query_end, document_end])
    if not parts[2]:
        raise ValueError(
            f"special_token {special_token!r} gives no token but white space; it ends the prompt, and the answer is "
            "read at its last token"
        )
    owners = tokenizer("a").sequence_ids()
    bos = tokenizer("a")["input_ids"][: owners.index(0)]
    if parts[0][: len(bos)] != bos:
        parts[0] = bos + parts[0]
    ends = tuple(map(tuple, parts[3:]))
    return PairTemplate(*parts[:3], None, before_query, before_document, query_end, document_end, *ends, anchor=anchor)


def anchor_of(tokenizer: Tokenizer, special_tokens: list[str]) -> str:
    """A special token after which a text is tokenized as in the midst of another; nothing where it always is.

    SentencePiece puts its mark of a space before the first word of whatever it is given.
    """
    for token in special_tokens:
        if tokenize_after(token, tokenizer, ["a"]) != tokenize(tokenizer, ["a"]):
            return token
    return ""


def split_last_line(text: str) -> tuple[str, str]:
    """Up to and including the last line break, and the rest."""
    place = text.rfind("\n") + 1
    return text[:place], text[place:]


def split_white_space(text: str) -> tuple[str, str]:
    """The white space that the text begins with, and the rest."""
    rest = text.lstrip()
    return text[: len(text) - len(rest)], rest


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
