"""Text cut and padded by the columns that it takes in a terminal, where a Chinese character takes two.

What a reader would get wrong: `len` and `str.ljust` count characters. Emoji joined from several characters are
counted one by one here, and may come out too wide.
"""

import unicodedata

ELLIPSIS = "..."


def width(text: str) -> int:
    """Columns of a text without line breaks."""
    return sum(map(character_width, text))


def character_width(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf", "Cc"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1


def shorten(text: str, columns: int) -> str:
    """The text on one line, its white space joined, cut with "..." to at most `columns` (at least 3)."""
    text = " ".join(text.split())
    if width(text) <= columns:
        return text
    kept, room = [], columns - len(ELLIPSIS)
    for character in text:
        room -= character_width(character)
        if room < 0:
            break
        kept.append(character)
    return "".join(kept).rstrip() + ELLIPSIS


def pad(text: str, columns: int) -> str:
    """The text with spaces behind it up to `columns`."""
    return text + " " * max(columns - width(text), 0)
