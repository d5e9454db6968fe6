"""The optional secret that requests bring: `Authorization: Bearer TOKEN`.

What a reader would get wrong: `==` stops at the first character that differs, and its time tells how many were right.
`hmac.compare_digest` takes the same time for all, but refuses text beyond ASCII, so bytes are compared.
"""

import hmac
import os
from pathlib import Path

from rag_retrieval.serve.config import TOKEN_VARIABLE


def read_token(token_file: str | None) -> bytes | None:
    """The token of the file, else of the environment; None where there is neither. Raises ValueError for one that no
    header can carry (empty, spaces or line breaks inside, beyond ASCII), and OSError for an unreadable file."""
    if token_file is not None:
        return checked(Path(token_file).read_bytes().strip(), token_file)
    value = os.environ.get(TOKEN_VARIABLE)
    return None if value is None else checked(value.strip().encode(), TOKEN_VARIABLE)


def checked(token: bytes, place: str) -> bytes:
    if not token or not all(33 <= byte <= 126 for byte in token):
        raise ValueError(
            f"{place}: expected one token of visible ASCII characters without spaces, found "
            f"{'other characters' if token else 'nothing'}; write one, such as the output of `openssl rand -hex 32`"
        )
    return token


def is_authorized(header: str | None, token: bytes | None) -> bool:
    """header: the value of Authorization, None where the request has none. The scheme's case does not count."""
    if token is None:
        return True
    scheme, _, given = (header or "").partition(" ")
    given_bytes = given.strip().encode("utf-8", "surrogateescape")
    return hmac.compare_digest(given_bytes, token) and scheme.lower() == "bearer"
