"""Finished stages of long work on disk, so that a killed run continues, and a further run builds less.

Each stage is a folder whose name holds a digest of all that it was made from: with other data, another model or other
settings the name is another one, and nothing old is ever taken for new. A folder under its own name is complete; one
that ends in `.partial` is not, and only a stage that `resumes` finds its own partial folder again.
"""

import hashlib
import json
import re
import shutil
from collections.abc import Callable
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from typing import Any

from rag_retrieval.core.files import locked

VERSION = 2  # raise it whenever the same sources would give another content of any stage
BLOCK = 1 << 20  # bytes read at once
STAGE_NAME = re.compile(r"[a-z0-9]+-[0-9a-f]{16}(\.partial)?")


class WorkFolder:
    def __init__(self, path: Path):
        self.path = path

    def locked(self) -> AbstractContextManager[None]:
        """To be held while a run works here. Raises ValueError while another does."""
        return locked(self.path / "lock", f"{self.path}: another run works here; wait for it, or set work_dir")

    def stage(self, name: str, made_from: Any, build: Callable[[Path], None], resumes: bool = False) -> Path:
        """The complete folder of a stage, built by `build(partial folder)` unless it is there."""
        folder = self.path / f"{name}-{digest_of([VERSION, made_from])}"
        if not folder.exists():
            partial = folder.with_name(f"{folder.name}.partial")
            if not resumes:
                shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir(exist_ok=True)
            build(partial)
            partial.rename(folder)
        return folder

    def remove(self) -> None:
        """What runs made here; the folder too unless something else is in it."""
        for path in self.path.iterdir():
            if STAGE_NAME.fullmatch(path.name):
                shutil.rmtree(path)
        (self.path / "lock").unlink(missing_ok=True)
        with suppress(OSError):
            self.path.rmdir()


def digest_of(values: Any) -> str:
    """16 hexadecimal digits for anything that JSON can write."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=8).hexdigest()


def content_of(path: Path) -> str:
    """A digest of the whole content: of a file, or of a model's folder with the names in it."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    digest = hashlib.blake2b(digest_size=16)
    for file in files:
        digest.update(f"{file.relative_to(path)}:{file.stat().st_size}:".encode())
        with file.open("rb") as stream:
            while block := stream.read(BLOCK):
                digest.update(block)
    return digest.hexdigest()
