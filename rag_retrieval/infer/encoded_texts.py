"""What `Embedder.encode(outputs=...)` gives: dense vectors, lexical weights and token vectors of texts.

Nothing here imports torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from tokenizers import Tokenizer

WORD_STARTS = ("▁", "Ġ")  # how the tokens of SentencePiece and of byte-level BPE mark the beginning of a word

Weights = tuple[np.ndarray, np.ndarray]  # of one text: token ids by ascending id, and the weight of each


@dataclass(frozen=True, eq=False)
class EncodedTexts:
    """One entry for each text, in their order; None for a representation that was not asked for.

    dense: [texts, dim]. lexical: for each text a dict from token to weight. multi_vector: for each text an array
    [tokens, width]. Of one text that stood in no list: its vector [dim], its dict and its array.
    """

    dense: np.ndarray | None = None
    lexical: "LexicalWeights | dict[str, float] | None" = None
    multi_vector: list[np.ndarray] | np.ndarray | None = None


@dataclass(frozen=True, eq=False)
class LexicalWeights(Sequence):
    """A sequence with a dict from token to weight for each text, largest weight first. Weights of 0 are left out.

    ids: [entries], int32, token ids, text after text and ascending within a text. weights: [entries], float32, above 0.
    starts: [texts + 1], int64, where the entries of each text begin, and their number. tokenizer: names the ids, see
    `token_name`.
    """

    ids: np.ndarray
    weights: np.ndarray
    starts: np.ndarray
    tokenizer: Tokenizer

    @classmethod
    def of(cls, texts: Iterable[Weights], tokenizer: Tokenizer) -> "LexicalWeights":
        kept = [(ids[weights > 0], weights[weights > 0]) for ids, weights in texts]
        starts = np.cumsum([0, *(len(ids) for ids, _ in kept)])
        ids = np.concatenate([np.empty(0, np.int32), *(ids for ids, _ in kept)]).astype(np.int32)
        weights = np.concatenate([np.empty(0, np.float32), *(weights for _, weights in kept)])
        return cls(ids, weights, starts, tokenizer)

    def __len__(self) -> int:
        return len(self.starts) - 1

    def __getitem__(self, place):
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        return {token_name(self.tokenizer, token): weight for token, weight in self.by_id(place).items()}

    def by_id(self, place: int) -> dict[int, float]:
        """The weight of each token id of a text, largest first. IndexError for a text that is not there."""
        place = range(len(self))[place]
        ids, weights = (part[self.starts[place] : self.starts[place + 1]] for part in (self.ids, self.weights))
        order = np.argsort(-weights, kind="stable")
        return dict(zip(ids[order].tolist(), weights[order].tolist(), strict=True))


def by_text(values: Sequence[np.ndarray], counts: np.ndarray) -> list:
    """Arrays of the entries of texts, text after text, in pieces: for each text its part of the one array, or a tuple
    of its parts. counts: [texts], entries of each."""
    pieces = [np.split(each, np.cumsum(counts)[:-1]) for each in values]
    return pieces[0] if len(pieces) == 1 else list(zip(*pieces, strict=True))


def token_name(tokenizer: Tokenizer, token: int) -> str:
    """The text of a token without the mark of a word's beginning: "panda" for "▁panda".

    Two tokens never have the same name: where that text is another token of the vocabulary, and where a token is only a
    part of a character, a byte or white space, the name is the vocabulary's own.
    """
    name = tokenizer.id_to_token(token)
    if name is None:  # a model may have more rows than its tokenizer has tokens
        return f"[{token}]"
    text = tokenizer.decode([token], skip_special_tokens=False)
    text = text.removeprefix(" ") if name.startswith(WORD_STARTS) else text
    # a decoder takes one mark or several away from the beginning
    is_text = text.strip() and text.isprintable() and "\ufffd" not in text and not name[1:].startswith(WORD_STARTS)
    return text if is_text and tokenizer.token_to_id(text) in (None, token) else name
