"""From a query and a document to token ids: fixed parts, budgets, truncation.

A pair is `prefix + query + middle + document + suffix`. Prefix, middle and suffix (bos, cls, sep, the
separator, the special token that asks for the score) are never truncated; only the two texts are. The parts are
tokenized one by one, so a query has the same tokens with every document; `decoder_template`
says how they are still those of the whole text.

Special tokens inside a text ("[SEP]", "<|im_end|>") are control tokens to a tokenizer: a document could close its own
slot in a prompt. With `split_special_tokens` such a token is split after its first character and its two halves are
tokenized apart, so that the text keeps its characters and gives no control token. Decoders split them, and so do
encoders that pool at the last eos of a row (BART, T5), where a row with another number of them is an error; the other
encoders read them as they are, as other libraries do. Nothing here imports torch.
"""

import copy
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Annotated, Literal

import numpy as np
from pydantic import Field
from tokenizers import Tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Kind = Literal["query", "document"]
TokenId = Annotated[int, Field(strict=True, ge=0)]
QUERY_SHARE = 0.5  # of the tokens that the fixed parts leave; beyond it a query gives way to the document
LONGEST_QUERY = 0.75  # of these tokens; a longer query is cut to this where the document is read in slices


@dataclass(frozen=True, eq=False)
class EncodedPair:
    """One pair. ids: its tokens; types: their segment ids, None for families without segments: both [tokens], int32.

    document_start: tokens before the document, which pairs of one query have in common. Of a single text: is_query,
    whether it was encoded as a query; expansion, how many of its last tokens are mask tokens that expand a query.
    """

    ids: np.ndarray
    types: np.ndarray | None
    truncated: bool
    document_start: int
    is_query: bool = False
    expansion: int = 0

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True)
class PairTemplate:
    """The fixed parts of a pair, as token ids, and the segment id of every part.

    `types` holds the segment ids of (prefix, query, middle, document, suffix); None without segments.
    `before_query` and `before_document` are the text before each of the two texts and tokenized with it.
    `after_query` and `after_document` are tokenized with the text before them too ("?" and a line break are one
    token in some families), and stay, as `query_end` and `document_end`, where that text is cut; what comes later
    belongs to `middle` or `suffix`, where truncation cannot reach it.
    `following_query` and `following_document` are the character after that, where it decides how white space before
    it is tokenized; it is tokenized too and left out.
    `anchor` is put before each text while it is tokenized, where a family would otherwise mark it as the beginning of
    a text. With `query_first` the query does begin the text. With `truncate_left` a document that is too long loses its
    beginning.
    """

    __pydantic_config__ = {"extra": "forbid"}  # where a template is read from a file

    prefix: list[TokenId]
    middle: list[TokenId]
    suffix: list[TokenId]
    types: tuple[list[TokenId], TokenId, list[TokenId], TokenId, list[TokenId]] | None = None
    before_query: str = ""
    before_document: str = ""
    after_query: str = ""
    after_document: str = ""
    query_end: tuple[TokenId, ...] = ()
    document_end: tuple[TokenId, ...] = ()
    anchor: str = ""
    following_query: str = ""
    following_document: str = ""
    query_first: bool = False
    truncate_left: bool = False

    @property
    def fixed_tokens(self) -> int:
        return len(self.prefix) + len(self.middle) + len(self.suffix)

    def around(self, kind: Kind) -> tuple[str, str, str, bool]:
        """What stands before and after the texts of a kind, what follows, and whether these begin the whole text."""
        if kind == "query":
            return self.before_query, self.after_query, self.following_query, self.query_first
        return self.before_document, self.after_document, self.following_document, False


def encoder_template(tokenizer: "PreTrainedTokenizerBase") -> PairTemplate:
    """Read the family's own pair layout, e.g. `[CLS] q [SEP] d [SEP]` or `<s> q </s></s> d </s>`."""
    encoded = tokenizer("a", "b")
    owners = encoded.sequence_ids()  # None for a special token, else 0 (query) or 1 (document)
    first = [position for position, owner in enumerate(owners) if owner == 0]
    second = [position for position, owner in enumerate(owners) if owner == 1]
    spans = (slice(0, first[0]), slice(first[-1] + 1, second[0]), slice(second[-1] + 1, len(owners)))
    prefix, middle, suffix = (encoded["input_ids"][span] for span in spans)
    types = None
    if "token_type_ids" in encoded:
        segments = encoded["token_type_ids"]
        parts = [segments[span] for span in spans]
        types = (parts[0], segments[first[0]], parts[1], segments[second[0]], parts[2])
    return PairTemplate(prefix, middle, suffix, types)


def split_format(name: str, text: str) -> tuple[str, str]:
    """The text before and after the one `{}` of a format; ValueError when there is not exactly one."""
    if text.count("{}") != 1:
        raise ValueError(f"{name} must contain {{}} exactly once, where the text goes; found {text!r}")
    before, _, after = text.partition("{}")
    return before, after


class TokenizerCopy:
    """A private copy of a fast tokenizer, with padding and truncation off; made again when tokens were added to the
    original. It takes seconds for 150,000 tokens.

    The tokenizer that transformers holds is changed by every call that pads or truncates, and such a call in another
    thread breaks ("Already borrowed") or truncates what is tokenized here.
    """

    def __init__(self, original: "PreTrainedTokenizerBase | Tokenizer"):
        self.original = original if isinstance(original, Tokenizer) else original.backend_tokenizer
        self._copy()

    def _copy(self) -> None:
        self.size = self.original.get_vocab_size()
        self.fast = bare(copy.deepcopy(self.original))
        added = self.fast.get_added_tokens_decoder().values()
        special = (re.escape(token.content) for token in added if token.special and len(token.content) > 1)
        # a position before each, overlapping ones too; without special tokens it matches nothing
        self.special = re.compile(f"(?={'|'.join(sorted(special, key=len, reverse=True)) or '(?!)'})")

    def current(self) -> "TokenizerCopy":
        if self.original.get_vocab_size() != self.size:
            self._copy()
        return self

    def pieces(self, text: str) -> list[str]:
        """The text, split after the first character of every special token in it."""
        places = [match.start() + 1 for match in self.special.finditer(text)]
        return [text[start:stop] for start, stop in zip([0, *places], [*places, len(text)], strict=True)]


def bare(tokenizer: "PreTrainedTokenizerBase | Tokenizer") -> Tokenizer:
    """The fast tokenizer within, padding and truncation off, as a call of transformers without them leaves it."""
    fast = tokenizer if isinstance(tokenizer, Tokenizer) else tokenizer.backend_tokenizer
    fast.no_padding()
    fast.no_truncation()
    fast.encode_special_tokens = False  # those of formats stay; those of texts are split by `TokenizerCopy.pieces`
    return fast


def tokenize(tokenizer: Tokenizer, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, without special tokens and without truncation. tokenizer: a bare one."""
    return [encoding.ids for encoding in tokenizer.encode_batch_fast(list(texts), add_special_tokens=False)]


def tokenize_in_context(
    tokenizer: Tokenizer, texts: Sequence[str], context: str, next_char: str, first: bool = False
) -> list[list[int]]:
    """Token ids of each text as they are after `context` and before `next_char`, whose own are left out.

    Each of the two may be empty; they are PairTemplate's `anchor` and `following_...`. first: the texts begin
    the whole text after all.
    """
    if not context and not next_char:
        return tokenize(tokenizer, texts)
    start, after = context_tokens(tokenizer, context, next_char)
    if first:
        context, start = "", 0
    texts = [context + text + next_char for text in texts]
    return [ids[start : len(ids) - after] for ids in tokenize(tokenizer, texts)]


def context_tokens(tokenizer: Tokenizer, context: str, next_char: str) -> tuple[int, int]:
    """How many tokens are those of `context`, and how many those of `next_char`."""
    alone, both = tokenize(tokenizer, [context, context + next_char])
    return len(alone), len(both) - len(alone)


def fit_to_budget(query_tokens: int, document_tokens: int, budget: int) -> tuple[int, int]:
    """How many tokens of each text to keep, both from their beginning, within `budget` tokens.

    The document is cut to what the query leaves. A query is itself cut only when it exceeds QUERY_SHARE of
    the budget and the document needs the room.
    """
    query_keep = min(query_tokens, max(int(budget * QUERY_SHARE), budget - document_tokens))
    return query_keep, min(document_tokens, budget - query_keep)


def truncate(ids: Sequence[int] | np.ndarray, keep: int, end: Sequence[int]) -> Sequence[int] | np.ndarray:
    """`keep` ids from the beginning; where that is not all, the last of them are `end`."""
    return ids[:keep] if keep >= len(ids) or not end else np.append(ids[: keep - len(end)], end).astype(np.int32)


@dataclass(frozen=True)
class PairEncoder:
    """Encodes pairs for one model: its tokenizer, its template and its limit of `max_length` tokens.

    tokenizer: of transformers or, where there is only a tokenizer.json, of the tokenizers library.
    split_special_tokens: whether those inside a text become plain text. Several threads may use one encoder.
    """

    tokenizer: "PreTrainedTokenizerBase | Tokenizer"
    template: PairTemplate
    max_length: int
    split_special_tokens: bool = False
    private: TokenizerCopy | None = field(default=None, repr=False, compare=False)
    budget: int = field(init=False)

    def __post_init__(self):
        if self.private is None:
            object.__setattr__(self, "private", TokenizerCopy(self.tokenizer))
        budget = self.max_length - self.template.fixed_tokens
        least = 2 * (1 + max(len(self.template.query_end), len(self.template.document_end)))
        if budget < least:
            raise ValueError(
                f"max_length {self.max_length} is too small: special tokens, separator and formats take "
                f"{self.template.fixed_tokens} tokens, and query and document, with what stands right after them, "
                f"need at least {least}"
            )
        object.__setattr__(self, "budget", budget)
        parts = (self.template.prefix, self.template.middle, self.template.suffix)
        object.__setattr__(self, "_fixed", [np.array(part, np.int32) for part in parts])

    @property
    def fast_tokenizer(self) -> Tokenizer:
        """A private copy of the tokenizer, with all tokens that it has now."""
        return self.private.current().fast

    def with_max_length(self, max_length: int) -> "PairEncoder":
        """The same encoder with another limit; the copy of the tokenizer is shared. ValueError for one too small."""
        return self if max_length == self.max_length else replace(self, max_length=max_length)

    def text_ids(self, texts: Sequence[str], kind: Kind) -> list[np.ndarray]:
        """Token ids of each query or document with what its format puts beside it, not truncated: int32."""
        private, (before, after, following, first) = self.private.current(), self.template.around(kind)
        whole = [before + text + after for text in texts]
        lists = tokenize_in_context(private.fast, whole, self.template.anchor, following, first)
        if self.split_special_tokens:
            for place, text in enumerate(texts):
                if private.special.search(text):
                    lists[place] = self.ids_and_offsets(text, kind)[0]
        return [np.array(ids, np.int32) for ids in lists]

    def ids_and_offsets(self, text: str, kind: Kind) -> tuple[list[int], list[tuple[int, int]]]:
        """The ids of `text_ids`, and the characters of each in anchor + what is before the text + text + ..., the end
        not included."""
        before, after, following, first = self.template.around(kind)
        private, anchor = self.private.current(), self.template.anchor
        pieces = private.pieces(text) if self.split_special_tokens else [text]
        ids, offsets, place = [], [], 0
        anchor_tokens, following_tokens = context_tokens(private.fast, anchor, following)
        for number, piece in enumerate(pieces):
            is_first, is_last = number == 0, number == len(pieces) - 1
            context = "" if first and is_first else anchor
            whole = context + (before if is_first else "") + piece + (after + following if is_last else "")
            encoding = private.fast.encode(whole, add_special_tokens=False)
            kept = slice(anchor_tokens if context else 0, len(encoding) - (following_tokens if is_last else 0))
            shift = 0 if is_first else len(before) + place
            ids += encoding.ids[kept]
            offsets += [(start + shift, stop + shift) for start, stop in encoding.offsets[kept]]
            place += len(piece)
        return ids, offsets

    def fits(self, query_ids: Sequence[int] | np.ndarray, document_ids: Sequence[int] | np.ndarray) -> bool:
        """Whether `join` keeps all of both."""
        return len(query_ids) + len(document_ids) <= self.budget

    def room_for_slices(self, query_tokens: int) -> tuple[int, int]:
        """How many tokens of a query to keep where its document is read in slices, and how many a slice may have."""
        query_keep = min(query_tokens, int(self.budget * LONGEST_QUERY))
        return query_keep, self.budget - query_keep

    def untruncated_lengths(self, pairs: Sequence[tuple[str, str]]) -> np.ndarray:
        """Tokens of each pair, special tokens included, before truncation: int [pairs]."""
        queries = self.text_ids([query for query, _ in pairs], "query")
        documents = self.text_ids([document for _, document in pairs], "document")
        tokens = [len(query) + len(document) for query, document in zip(queries, documents, strict=True)]
        return np.array(tokens, int) + self.template.fixed_tokens

    def join(self, query_ids: Sequence[int] | np.ndarray, document_ids: Sequence[int] | np.ndarray) -> EncodedPair:
        """One pair of at most `max_length` tokens from the ids of its two texts."""
        template, (prefix, middle, suffix) = self.template, self._fixed
        query_keep, document_keep = fit_to_budget(len(query_ids), len(document_ids), self.budget)
        query = truncate(query_ids, query_keep, template.query_end)
        if template.truncate_left:
            document = document_ids[len(document_ids) - document_keep :]
        else:
            document = truncate(document_ids, document_keep, template.document_end)
        truncated = query_keep < len(query_ids) or document_keep < len(document_ids)
        ids = np.concatenate((prefix, query, middle, document, suffix), dtype=np.int32, casting="unsafe")
        document_start = len(prefix) + query_keep + len(middle)
        types = None
        if template.types is not None:
            before, query_type, between, document_type, after = template.types
            kinds = np.array([*before, query_type, *between, document_type, *after], np.int32)
            counts = [*[1] * len(prefix), query_keep, *[1] * len(middle), document_keep, *[1] * len(suffix)]
            types = np.repeat(kinds, counts)
        return EncodedPair(ids, types, truncated, document_start)

    def encode(self, pairs: Sequence[Sequence[str]]) -> list[EncodedPair]:
        """Encode (query, document) pairs in order; a query that repeats is tokenized once."""
        queries = list(dict.fromkeys(query for query, _ in pairs))
        ids_of = dict(zip(queries, self.text_ids(queries, "query"), strict=True))
        documents = self.text_ids([document for _, document in pairs], "document")
        return [self.join(ids_of[query], ids) for (query, _), ids in zip(pairs, documents, strict=True)]
