"""The text around a pair for a causal model, `query_format + seq + document_format + special_token`, as its parts.

The tokens of a pair must be those of its whole text, as other programs tokenize it, or scores drift. So the
text is split only where tokenizers split it anyway (see `safe_split_points`), and what stands between a query or
document and such a place is tokenized with it: many families make one token of "?" and a line break after it. Formats
that have no such place are split all the same, and then a token may differ.
"""

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from tokenizers import Tokenizer

from rag_retrieval.models.pair_encoding import PairTemplate, bare, split_format, tokenize, tokenize_in_context

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

INSTRUCTION = "{instruction}"


def decoder_template(
    tokenizer: "PreTrainedTokenizerBase",
    query_format: str,
    document_format: str,
    seq: str,
    special_token: str,
    instruction: str | None = None,
) -> PairTemplate:
    """The parts of `[bos] query_format + seq + document_format + special_token`.

    instruction: stands for `{instruction}` in the formats, which is plain text where it is None. bos is added where the
    family has one and the text does not begin with it. Where a pair is truncated, what is right before query or
    document is cut last, and all else of the formats stays. Raises ValueError for a format without exactly one `{}`,
    and for a special_token without tokens.
    """
    before_query, after_query = split_format("query_format", query_format)
    before_document, after_document = split_format("document_format", document_format)
    texts = before_query, after_query + seq + before_document, after_document + special_token
    if instruction is not None:
        texts = tuple(text.replace(INSTRUCTION, instruction) for text in texts)
    fast = bare(tokenizer)
    split = split_texts(*texts, added_tokens(fast))
    anchor = context_prefix(fast, tokenizer.all_special_tokens)
    parts = [split.prefix, split.middle, split.suffix, split.after_query, split.after_document]
    prefix, middle, suffix, query_end, document_end = (
        tokenize_in_context(fast, [part.text], anchor, part.following, first=part is split.prefix)[0] for part in parts
    )
    if not suffix:
        raise ValueError(f"special_token {special_token!r} gives no token; the score is read at its last token")
    return PairTemplate(
        missing_bos(tokenizer, fast, texts[0]) + prefix,
        middle,
        suffix,
        before_query=split.before_query,
        before_document=split.before_document,
        after_query=split.after_query.text,
        after_document=split.after_document.text,
        query_end=tuple(query_end),
        document_end=tuple(document_end),
        anchor=anchor,
        following_query=split.after_query.following,
        following_document=split.after_document.following,
        query_first=not split.prefix.text,
    )


class Part(NamedTuple):
    """following: the character after the text where it decides how white space at the end of the text is split.

    GPT-2 and relatives keep the last white space before a word apart, but not at the end of a text.
    """

    text: str
    following: str


class SplitTexts(NamedTuple):
    """What stands around query and document, in its order."""

    prefix: Part
    before_query: str
    after_query: Part
    middle: Part
    before_document: str
    after_document: Part
    suffix: Part


def split_texts(before: str, between: str, after: str, token: str) -> SplitTexts:
    """The texts before, between and after query and document, split where tokenizers split.

    token: see `safe_split_points`.
    """
    start = max(safe_split_points(before, token), default=0)
    # after "\n" alone a document that begins with white space would still join; it is the best place that there is
    places = safe_split_points(between, token) or [between.rfind("\n") + 1]
    first, last = places[0], places[-1]
    end = min(safe_split_points(after, token), default=0)
    return SplitTexts(
        Part(before[:start], next_char(before, start, token)),
        before[start:],
        Part(between[:first], next_char(between, first, token)),
        Part(between[first:last], next_char(between, last, token)),
        between[last:],
        Part(after[:end], next_char(after, end, token)),
        Part(after[end:], ""),
    )


def safe_split_points(text: str, token: str) -> list[int]:
    """Where tokenizers split a text whatever stands around it, ascending; never at its end.

    That is before an added token, after line breaks, and before the one space that leads a word or a sign: most
    families make it part of that, but SentencePiece may join it with a space that ends the query or document before it.
    token: a pattern of the tokenizer's added tokens.
    """
    # some families join "\n/"; white space goes together
    places = rf"(?={token})|(?<=\n)(?=[^\s/])|(?<![^\S\n])(?= (?!{token})\S)"
    return [match.start() for match in re.finditer(places, text)]


def next_char(text: str, place: int, token: str) -> str:
    """See Part; for a text split at this place. A letter replaces what is not known, the document's beginning."""
    if not text[:place].endswith("\n") or re.match(rf"[\s/]|{token}", text[place:]):
        return ""
    return text[place : place + 1] or "a"


def added_tokens(tokenizer: Tokenizer) -> str:
    """A pattern of the added tokens, but for white space: Gemma's "\n" joins the line break before it."""
    contents = (token.content for token in tokenizer.get_added_tokens_decoder().values())
    patterns = [re.escape(content) for content in contents if content.strip()]
    return f"(?:{'|'.join(patterns)})" if patterns else "(?!)"  # the latter matches nothing


def context_prefix(tokenizer: Tokenizer, special_tokens: Sequence[str]) -> str:
    """A text after which another is tokenized as in the middle of a text; empty where it always is.

    SentencePiece puts its mark of a space before the first word of a text, of some families after special tokens too.
    """
    alone = tokenize(tokenizer, ["a"])[0]
    for anchor in (*special_tokens, "x\n"):
        inside, spaced = tokenize_in_context(tokenizer, ["a", " a"], anchor, "")
        if inside not in (alone, spaced):  # equal to spaced: the token swallows the space after it
            return anchor
    return ""


def missing_bos(tokenizer: "PreTrainedTokenizerBase", fast: Tokenizer, text: str) -> list[int]:
    """The tokens that the tokenizer puts before a text, unless the text begins with them. fast: its bare one."""
    encoded = tokenizer("a")
    bos = encoded["input_ids"][: encoded.sequence_ids().index(0)]
    return [] if tokenize(fast, [text + "a"])[0][: len(bos)] == bos else bos
