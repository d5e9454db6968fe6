"""Finished parts of a scoring run on disk, so that a killed run can continue with any number of processes.

A part is a stretch of whole records. Which records it holds, and so which pairs share a forward pass, depends only on
the data and `pairs_per_part`: parts of one run and of the next fit together byte by byte. A part under its own name
is complete: it is written under another name and renamed.
"""

import os
import re
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rag_retrieval.core.files import atomic_write, is_real_folder, read_json, write_json
from rag_retrieval.data.records import Record

RUN_FILE = "run.json"
PART_NAMES = "from-*.jsonl"
OWN_NAMES = re.compile(r"run\.json|from-\d{9}\.jsonl|output\.tmp|\..*\.tmp")


@dataclass(frozen=True)
class Part:
    """`records` records from `first` on, counted from 0, and the pairs in them."""

    first: int
    records: int
    pairs: int

    @property
    def name(self) -> str:
        return f"from-{self.first:09d}.jsonl"


def plan_parts(records: Iterable[Record], pairs_per_part: int) -> list[Part]:
    """Parts of whole records, each closed as soon as it has `pairs_per_part` pairs."""
    parts, first, pairs, count = [], 0, 0, 0
    for count, record in enumerate(records, start=1):
        pairs += len(record.documents)
        if pairs >= pairs_per_part:
            parts.append(Part(first, count - first, pairs))
            first, pairs = count, 0
    if pairs:
        parts.append(Part(first, count - first, pairs))
    return parts


def records_of(parts: list[Part], records: Iterable[Record]) -> Iterator[tuple[Part, list[Record]]]:
    """The records of each of some parts, which are in order; the records of the others are passed over."""
    records = enumerate(records)
    for part in parts:
        own = []
        for place, record in records:
            if place >= part.first:
                own.append(record)
            if len(own) == part.records:
                break
        yield part, own


class PartFolder:
    """The folder beside the output that keeps its finished parts."""

    def __init__(self, output: Path):
        self.output = output
        self.path = output.with_name(f"{output.name}.parts")

    def begin(self, run: dict, overwrite: bool) -> None:
        """Use the folder for a run that is described by `run` (plain JSON values).

        Raises ValueError for a folder that holds anything but parts, and for finished parts of another run, unless
        they may be overwritten. A run that ended before its first part, over a wrong teacher for example, does not
        bind the next.
        """
        self._check_is_ours()
        before = read_json(self.path / RUN_FILE)
        if self.path.exists() and before != run:
            if not overwrite and any(self.path.glob(PART_NAMES)):
                raise ValueError(self._other_run(before, run))
            shutil.rmtree(self.path)
        self.path.mkdir(parents=True, exist_ok=True)
        for temporary in self.path.glob("*.tmp"):
            temporary.unlink()
        write_json(self.path / RUN_FILE, run)

    def _check_is_ours(self) -> None:
        if not self.path.exists() and not self.path.is_symlink():
            return
        others = [self.path.name] if not is_real_folder(self.path) else [
            path.name for path in self.path.iterdir() if not OWN_NAMES.fullmatch(path.name) or path.is_dir()
        ]  # fmt: skip
        if others:
            raise ValueError(
                f"output: {self.path} is where finished parts are kept, and it is not of this program "
                f"({', '.join(sorted(others)[:3])}); move it, or take another output"
            )

    def _other_run(self, before: dict, run: dict) -> str:
        lines = "".join(
            f"\n  {key}: was {before.get(key)!r}, now {value!r}"
            for key, value in run.items()
            if before.get(key) != value
        )
        return (
            f"output: {self.path} holds parts of a run that differs:{lines}\nRestore these to continue it, or say "
            "overwrite: true to start over, or take another output"
        )

    def is_finished(self, part: Part) -> bool:
        return (self.path / part.name).exists()

    def take_finished(self, waiting: list[Part]) -> int:
        """Take out of `waiting` the parts that any process has finished by now. Returns the pairs in them."""
        finished = {part for part in waiting if self.is_finished(part)}
        waiting[:] = [part for part in waiting if part not in finished]
        return sum(part.pairs for part in finished)

    def write(self, part: Part, lines: Iterable[str]) -> None:
        with atomic_write(self.path / part.name) as temporary, temporary.open("w", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())

    def lines(self, parts: list[Part]) -> Iterator[str]:
        """The lines of finished parts. Raises ValueError for one with another number of lines than records."""
        for part in parts:
            path, count = self.path / part.name, 0
            with path.open(encoding="utf-8", newline="\n") as file:
                for line in file:
                    count += 1
                    yield line
            if count != part.records:
                found = f"{path}: has {count} lines and was written with {part.records}"
                raise ValueError(f"{found}; delete it, and the same command scores that part again")

    def finish(self, parts: list[Part]) -> None:
        """All parts one after another as the output, whole or not at all; then the folder is removed."""
        temporary = self.path / "output.tmp"
        with temporary.open("wb") as file:
            for part in parts:
                with (self.path / part.name).open("rb") as source:
                    shutil.copyfileobj(source, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, self.output)
        shutil.rmtree(self.path)
