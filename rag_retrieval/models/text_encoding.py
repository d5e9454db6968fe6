"""From single texts to token ids: the prompt of their kind, the special tokens of the family, truncation.

A text is `prefix + (prompt + text) + suffix`: prompt and text are tokenized as one string, as other libraries do, cut
to what the special tokens leave, and only then get the suffix, so that a decoder always ends with the token that its
vector is read at. Nothing here imports torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer, processors

from rag_retrieval.models.pair_encoding import EncodedPair, TokenizerCopy, tokenize

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# names of prompts in sentence-transformers' files, of which a kind of text gets the first that the model has
PROMPT_NAMES = {"query": ("query",), "document": ("document", "passage", "corpus")}


@dataclass(frozen=True)
class TextTemplate:
    """prefix, suffix: special tokens around every text. has_types: whether the family has segment ids, all 0 here.
    cls_interval: a long text gets the prefix's one token again after every so many tokens, itself counted (MCLS of
    BGE-M3, https://arxiv.org/abs/2402.03216); None for none. truncate_left: a text that is too long loses its
    beginning. empty_token: what stands for an empty text of a family without special tokens. expansion_token: what
    fills up queries to expanded_length tokens (ColBERT); None for none.
    """

    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    has_types: bool = False
    cls_interval: int | None = None
    truncate_left: bool = False
    empty_token: int = 0
    expansion_token: int | None = None
    expanded_length: int = 0


def text_template(tokenizer: "PreTrainedTokenizerBase") -> TextTemplate:
    """What the family's own tokenizer puts around a text, e.g. `[CLS] text [SEP]`."""
    encoded = tokenizer("a")
    owners = encoded.sequence_ids()  # None for a special token
    own = [place for place, owner in enumerate(owners) if owner is not None]
    ids = encoded["input_ids"]
    return TextTemplate(
        tuple(ids[: own[0]]),
        tuple(ids[own[-1] + 1 :]),
        has_types="token_type_ids" in encoded,
        empty_token=tokenizer.eos_token_id or 0,
    )


def append_eos(tokenizer: "PreTrainedTokenizerBase", template: TextTemplate, eos_token: str) -> TextTemplate:
    """Let a decoder's texts end with this token, here and, by the tokenizer that is saved, in other libraries."""
    ids = [*template.prefix, tokenizer.convert_tokens_to_ids(eos_token)]
    before = tokenizer.convert_ids_to_tokens(list(template.prefix))
    single = [*before, "$A", eos_token]
    pair = [*single, *(f"{part}:1" for part in (*before, "$B", eos_token))]
    special = list(dict(zip((*before, eos_token), ids, strict=True)).items())
    fast = tokenizer.backend_tokenizer
    own = fast.post_processor
    fast.post_processor = processors.TemplateProcessing(single, pair, special)
    if own is not None and not before:
        fast.post_processor = processors.Sequence([own, fast.post_processor])
    changed = text_template(tokenizer)
    assert (changed.prefix, changed.suffix) == (template.prefix, (ids[-1],)), "the tokenizer ends texts as we do"
    return replace(template, suffix=changed.suffix)


@dataclass(frozen=True)
class TextEncoder:
    """Encodes texts for one model. Several threads may use one encoder.

    prompts: text before a text, by name; `PROMPT_NAMES` says which a kind of text gets. default_prompt: name of that of
    texts without a kind. max_lengths: tokens of a text with everything around it, by kind; "document" holds for others.
    """

    tokenizer: "PreTrainedTokenizerBase | Tokenizer"
    template: TextTemplate
    prompts: Mapping[str, str]
    max_lengths: Mapping[str, int]
    default_prompt: str | None = None
    private: TokenizerCopy | None = field(default=None, repr=False, compare=False)

    def __post_init__(self):
        if self.private is None:
            object.__setattr__(self, "private", TokenizerCopy(self.tokenizer))
        for kind in ("query", "document", None):
            prompt, limit = self.prompt_for(kind), self.max_length_of(kind)
            fixed = self.fixed_tokens(prompt)
            if fixed >= limit:
                raise ValueError(
                    f"max_length {limit} of a {kind or 'text'} is too small: special tokens and the prompt {prompt!r} "
                    f"take {fixed} tokens"
                )

    @property
    def fast_tokenizer(self) -> Tokenizer:
        """A private copy of the tokenizer, with all tokens that it has now."""
        return self.private.current().fast

    @property
    def max_length(self) -> int:
        """Of documents, and of texts without a kind."""
        return self.max_lengths["document"]

    def max_length_of(self, kind: str | None) -> int:
        return self.max_lengths.get(kind, self.max_length)

    def with_max_length(self, max_length: int) -> "TextEncoder":
        """The same encoder with one limit for every kind. ValueError for one too small."""
        return replace(self, max_lengths={"document": max_length})

    def with_truncation(self, left: bool) -> "TextEncoder":
        """The same encoder, by which a text that is too long loses its beginning (left) or its end."""
        return replace(self, template=replace(self.template, truncate_left=left))

    def prompt_for(self, kind: str | None) -> str:
        """The text before texts of this kind, "" for none. kind: "query", "document", the name of a prompt, or None."""
        names = PROMPT_NAMES.get(kind, (kind or self.default_prompt,))
        return next((self.prompts[name] for name in names if name in self.prompts), "")

    def fixed_tokens(self, prompt: str) -> int:
        """Tokens of an empty text after this prompt."""
        return len(self.join([], tokenize(self.fast_tokenizer, [prompt])[0]))

    def encode(
        self, texts: Sequence[str], kind: str | None = None, prompt: str | None = None, max_length: int | None = None
    ) -> list[EncodedPair]:
        """Token ids of each text. `document_start` is the number of tokens before the text itself, 0 without a prompt.

        prompt, max_length: in place of those of the kind.
        """
        prompt = self.prompt_for(kind) if prompt is None else prompt
        return self._joined(self._split(prompt, texts), kind, max_length)

    def encode_ids(
        self, texts: Sequence[Sequence[int]], kind: str | None = None, max_length: int | None = None
    ) -> list[EncodedPair]:
        """As `encode`, of texts that are token ids already, with or without the special tokens around a text. The
        prompt is tokenized by itself: where its last token would join the text's first, the result is another."""
        prompt_ids = tokenize(self.fast_tokenizer, [self.prompt_for(kind)])[0]
        return self._joined([(prompt_ids, self._without_special_tokens(ids)) for ids in texts], kind, max_length)

    def _without_special_tokens(self, ids: Sequence[int]) -> Sequence[int]:
        prefix, suffix = self.template.prefix, self.template.suffix
        ids = ids[len(prefix) :] if tuple(ids[: len(prefix)]) == prefix else ids
        ends = suffix and tuple(ids[-len(suffix) :]) == suffix
        return ids[: -len(suffix)] if ends else ids

    def _joined(
        self, parts: Sequence[tuple[Sequence[int], Sequence[int]]], kind: str | None, max_length: int | None
    ) -> list[EncodedPair]:
        """parts: the ids of the prompt and of the text itself."""
        limit = self.max_length_of(kind) if max_length is None else max_length
        encoded = [self.join(*each, limit) for each in parts]
        return [self.expand(text, limit) for text in encoded] if kind == "query" else encoded

    def _split(self, prompt: str, texts: Sequence[str]) -> list[tuple[list[int], list[int]]]:
        """The ids of the prompt and those of the text, tokenized as one string: a token that lies in both is the
        text's. They are told apart by their characters, because a prompt alone may have other tokens."""
        fast = self.fast_tokenizer
        if not prompt:
            return [([], ids) for ids in tokenize(fast, texts)]
        encodings = fast.encode_batch([prompt + text for text in texts], add_special_tokens=False)
        counts = (
            next((place for place, (_, end) in enumerate(each.offsets) if end > len(prompt)), len(each))
            for each in encodings
        )
        return [(each.ids[:count], each.ids[count:]) for each, count in zip(encodings, counts, strict=True)]

    def join(self, prompt_ids: Sequence[int], text_ids: Sequence[int], limit: int | None = None) -> EncodedPair:
        """One text from its ids, of at most `limit` tokens; None for no limit."""
        template = self.template
        ids, start = np.array([*prompt_ids, *text_ids], np.int32), len(prompt_ids)
        keep = len(ids) if limit is None else min(len(ids), self.budget(limit))
        dropped = len(ids) - keep
        if template.truncate_left:
            ids, start = ids[dropped:], max(0, start - dropped)
        else:
            ids, start = ids[:keep], min(start, keep)
        prefix = np.array(template.prefix, np.int32)
        if template.cls_interval is not None:
            own = template.cls_interval - 1  # tokens between two of them
            places = np.arange(0, max(1, len(ids)), own)
            start += len(places[places < start])
            ids, prefix = np.insert(ids, places, prefix), prefix[:0]
        elif start:
            start += len(prefix)
        ids = np.concatenate((prefix, ids, template.suffix), dtype=np.int32, casting="unsafe")
        if not len(ids):  # an empty text of a family without special tokens
            ids = np.array([template.empty_token], np.int32)
        types = np.zeros_like(ids) if template.has_types else None
        return EncodedPair(ids, types, dropped > 0, start)

    def expand(self, text: EncodedPair, limit: int | None = None) -> EncodedPair:
        """The text as a query, with mask tokens at its end where the template expands queries. limit: tokens at most;
        None for no other limit than that of the template."""
        template = self.template
        if template.expansion_token is None:
            return replace(text, is_query=True)
        length = template.expanded_length if limit is None else min(limit, template.expanded_length)
        more = max(0, length - len(text))
        ids = np.concatenate((text.ids, np.full(more, template.expansion_token, np.int32)))
        types = None if text.types is None else np.zeros_like(ids)
        return replace(text, ids=ids, types=types, is_query=True, expansion=more)

    def budget(self, limit: int) -> int:
        """Tokens of prompt and text that fit into `limit` tokens."""
        room = limit - len(self.template.suffix)
        interval = self.template.cls_interval
        return room - (len(self.template.prefix) if interval is None else -(-room // interval))
