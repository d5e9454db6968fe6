"""Pairs as callers give them, checked before anything is computed.

One [query, document] is taken as a list of one pair: two strings in a list are a pair, never two pairs.
"""

from collections.abc import Iterable, Mapping, Sequence, Set

import numpy as np


def check_pairs(pairs) -> list[tuple[str, str]]:
    """The pairs as a list of tuples; a single [query, document] becomes a list of one.

    Raises ValueError naming the position of the first pair that is none, and what was found there.
    """
    pairs = check_list("pairs", pairs)
    if len(pairs) == 2 and all(isinstance(text, str) for text in pairs):
        pairs = [pairs]
    return [check_pair(position, pair) for position, pair in enumerate(pairs)]


def check_list(name: str, values) -> list:
    """The values as a list. ValueError for a single text, for a mapping or a set, which have no positions, for a table
    (pandas, polars, pyarrow), which gives its columns and not its rows, and for what is no list at all."""
    if hasattr(values, "columns"):
        found = f"a {type(values).__name__}, whose columns these would be"
        raise ValueError(f"{name}: found {found}; give a list of its rows, such as frame[COLUMNS].values.tolist()")
    if isinstance(values, (str, bytes, Mapping, Set)) or not isinstance(values, Iterable):
        raise ValueError(f"{name}: expected a list, found {type(values).__name__}")
    return list(values)


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
