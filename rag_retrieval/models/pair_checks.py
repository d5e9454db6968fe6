"""What a user hands over as pairs, checked before anything is computed.

One [query, document] is taken as a list of one pair: two strings in a list are a pair, never two pairs.
"""

from collections.abc import Iterable, Mapping, Sequence, Set

import numpy as np


def check_pairs(pairs) -> list[tuple[str, str]]:
    """The pairs as a list of tuples; a single [query, document] becomes a list of one.

    Raises ValueError naming the position of the first pair that is none, and what was found there.
    """
    if isinstance(pairs, (str, bytes, Mapping, Set)) or not isinstance(pairs, Iterable):
        raise ValueError(f"pairs must be a list of [query, document], found {type(pairs).__name__}")
    pairs = list(pairs)
    if len(pairs) == 2 and all(isinstance(text, str) for text in pairs):
        pairs = [pairs]
    return [check_pair(position, pair) for position, pair in enumerate(pairs)]


def check_pair(position: int, pair) -> tuple[str, str]:
    if isinstance(pair, (str, bytes)) or not isinstance(pair, (Sequence, np.ndarray)) or len(pair) != 2:
        raise ValueError(f"pairs[{position}] must be [query, document], found {pair!r:.100}")
    for name, text in zip(("query", "document"), pair, strict=True):
        if not isinstance(text, str):
            raise ValueError(f"pairs[{position}]: the {name} must be a string, found {type(text).__name__}")
        if not is_unicode(text):
            raise ValueError(
                f"pairs[{position}]: the {name} holds half a surrogate pair, which is no text: {text!a:.100}"
            )
    return pair[0], pair[1]


def is_unicode(text: str) -> bool:
    """False for a lone surrogate, as a broken JSON escape gives: tokenizers cannot read it."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
