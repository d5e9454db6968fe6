"""Text for a terminal of so many columns, where a Chinese character takes two."""

import io
import re
import shutil
from collections.abc import Iterable, Sequence

from rich.console import Console, RenderableType
from rich.table import Table
from rich.text import Text

COLUMNS = 100  # where stdout is no terminal
# what would move the cursor, or turn the direction of a line
CONTROLS = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


def terminal_columns() -> int:
    """Of stdout; `COLUMNS` where that is no terminal."""
    return shutil.get_terminal_size((COLUMNS, 24)).columns


def rendered(parts: list[RenderableType], columns: int, styled: bool = False) -> str:
    """Text in `columns` columns. A plain text is never broken or cut, a `Text` is cut at the end of the terminal.
    styled: whether styles become escape codes, where TERM says that the terminal has some."""
    text = io.StringIO()
    console = _console(text, columns, styled)
    for part in parts:
        if isinstance(part, str):
            console.print(part, soft_wrap=True)
        else:
            console.print(part, no_wrap=True, overflow="ellipsis")
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines())


def wrapped(text: str, columns: int, most_lines: int | None = None) -> list[str]:
    """The text in lines of at most `columns` columns, broken between words; a longer word is broken inside. most_lines:
    the last of so many ends in an ellipsis where more would follow."""
    lines = Text(on_one_line(text)).wrap(_console(io.StringIO(), columns), columns)
    if most_lines is not None and len(lines) > most_lines:
        last = lines[most_lines - 1]
        last.rstrip()
        last.append("…" if last.cell_len < columns else " " * columns)
        last.truncate(columns, overflow="ellipsis")
        lines = lines[:most_lines]
    return [line.plain.rstrip() for line in lines]


def plain_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> Table:
    """Columns without lines, all but the first to the right."""
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="")
    for place, title in enumerate(head):
        table.add_column(title, justify="right" if place else "left", no_wrap=True)
    for cells in rows:
        table.add_row(*cells)
    return table


def on_one_line(text: str) -> str:
    """White space and control characters become single spaces."""
    return " ".join(CONTROLS.sub(" ", text).split())


def _console(file: io.StringIO, columns: int, styled: bool = False) -> Console:
    plain = {"markup": False, "highlight": False, "emoji": False, "color_system": "auto" if styled else None}
    return Console(file=file, width=columns, force_terminal=styled, **plain)
