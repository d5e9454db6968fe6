"""Files that are there whole or not at all.

The trap: only a rename is whole. Who writes to a file under its own name leaves half of it when killed.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Another name to write to, which takes the place of `path` when all went well, and is removed otherwise."""
    aside = path.with_name(f"{path.name}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def write_whole(path: Path, text: str) -> None:
    with replacing(path) as aside:
        aside.write_text(text, encoding="utf-8")
