"""Long work as files: numbered shards, each there whole or not at all, and a manifest of what they are made from.

    manifest.json             {"made_from": {...}, "shards": 40}
    shard-000012/             finished; its name proves it, and it is never made again
    .shard-000012.1a2b.tmp/   in work, or left by a process that was killed
    .shard-000012.lock        held by the process that makes it, for as long as that lives
    .lock                     held by the main process of the job

A job that was killed loses the shards in work. The same call goes on, with any engine and any number of processes, to
the same bytes, where a shard's bytes depend on nothing but its number: on one kind of CPU, with as many threads.
"""

import json
import os
import re
import shutil
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag_retrieval.core.command import CommandFailure, load_object
from rag_retrieval.core.distributed import SLOWEST
from rag_retrieval.core.files import flush_one, flush_to_disk, locked, read_json, write_json

MakeShard = Callable[[int, Path], Iterator[int] | None]
Report = Callable[..., None]  # of a shard's number: so many of its texts are done, or without a count, the whole shard
POLL = 0.2  # seconds between two looks at shards that other processes make
MANIFEST = "manifest.json"
FOREIGN = re.compile(r"(?!manifest\.json$|shard-\d{6,}$)[^.].*")
TEMPORARY = re.compile(r"\.shard-(\d{6,})\.[0-9a-f]{8}\.tmp")


class ShardError(CommandFailure):
    """A shard could not be made, and not by a mistake in options, data or models."""


@dataclass(frozen=True)
class ShardWork:
    """What makes the shards of a job.

    open: "module:function", called once in each worker, before its first shard, as `open(**arguments)`; it returns
    make(number, folder), which writes the files of shard `number` into the empty folder, and may yield how many of its
    texts are done since, for the progress. arguments: small and picklable, such as paths and options, never data.
    """

    open: str
    arguments: dict[str, Any]

    def open_here(self) -> MakeShard:
        return load_object(self.open)(**self.arguments)


def make_locally(shards: "ShardFolder", missing: list[int], opened: Callable[[], MakeShard], report: Report) -> None:
    """Returns when all of the missing shards are there, made by this process or another."""
    last_change = time.monotonic()
    while missing:
        claimed = []  # by other processes; when one of them is killed, its shard is free
        for number in missing:
            if shards.make(number, opened, report):
                report(number)
                last_change = time.monotonic()
            else:
                claimed.append(number)
        if claimed and time.monotonic() - last_change > SLOWEST.total_seconds():
            raise ShardError(f"{shards.path(claimed[0])}: another process has not finished it within {SLOWEST}")
        if claimed:
            time.sleep(POLL)
        missing = claimed


@dataclass(frozen=True)
class ShardFolder:
    folder: Path

    def path(self, number: int) -> Path:
        return self.folder / f"shard-{number:06d}"

    def is_finished(self, number: int) -> bool:
        return self.path(number).is_dir()

    def begin(self, made_from: dict[str, Any], count: int, overwrite: bool, lock: ExitStack) -> None:
        """Take the folder for shards made from this. A job that ended before its first shard does not bind the next."""
        self._refuse_other_things()
        lock.enter_context(locked(self.folder / ".lock", f"{self.folder}: another job works here; wait for it"))
        manifest = json.loads(json.dumps({"made_from": made_from, "shards": count}))
        before = read_json(self.folder / MANIFEST)
        if before != manifest:
            if any(self.folder.glob("shard-*")) and not overwrite:
                raise ValueError(self._difference(before, manifest))
            self.remove()
            write_json(self.folder / MANIFEST, manifest)
        self.remove_temporaries()

    def _refuse_other_things(self) -> None:
        if self.folder.is_symlink() or (self.folder.exists() and not self.folder.is_dir()):
            others = [self.folder.name]
        else:
            others = sorted(path.name for path in self.folder.glob("*") if FOREIGN.fullmatch(path.name))
        if others:
            raise ValueError(
                f"{self.folder} is where finished work is kept, and it is not of this program "
                f"({', '.join(others[:3])}); move it, or take another output"
            )

    def _difference(self, before: dict[str, Any], now: dict[str, Any]) -> str:
        if not isinstance(before.get("made_from"), dict):
            lines = [f"{MANIFEST} is missing or damaged"]
        else:
            earlier = before["made_from"] | {"shards": before.get("shards")}
            asked = now["made_from"] | {"shards": now["shards"]}
            names = [name for name in earlier | asked if earlier.get(name) != asked.get(name)]
            lines = [f"{name}: was {earlier.get(name)!r}, now {asked.get(name)!r}" for name in names]
        return (
            f"{self.folder} holds finished work of a run that differs:"
            + "".join(f"\n  {line}" for line in lines)
            + "\nRestore these to continue it, or say overwrite: true to start over, or take another output"
        )

    def make(self, number: int, opened: Callable[[], MakeShard], report: Report) -> bool:
        """Make a shard unless it is there. False where another process is making it. opened: gives what makes it."""
        with ExitStack() as claim:
            try:
                claim.enter_context(locked(self.folder / f".shard-{number:06d}.lock", "busy"))
            except ValueError:
                return False
            if not self.is_finished(number):
                self._write(number, opened(), report)
        return True

    def _write(self, number: int, make: MakeShard, report: Report) -> None:
        temporary = self.folder / f".shard-{number:06d}.{uuid.uuid4().hex[:8]}.tmp"
        temporary.mkdir()
        try:
            for count in make(number, temporary) or ():
                report(number, count)
            flush_to_disk(temporary)
            try:
                os.rename(temporary, self.path(number))
            except OSError:
                if not self.is_finished(number):  # else by another process, on a file system without locks
                    raise
            flush_one(self.folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def remove_temporaries(self) -> None:
        """What killed processes left; not what a process still writes that outlived its job."""
        for path in self.folder.glob(".shard-*.tmp"):
            if (name := TEMPORARY.fullmatch(path.name)) and not self.is_claimed(int(name[1])):
                shutil.rmtree(path, ignore_errors=True)

    def is_claimed(self, number: int) -> bool:
        with suppress(ValueError), locked(self.folder / f".shard-{number:06d}.lock", "busy"):
            return False
        return True

    def remove(self) -> None:
        """Raises ValueError while a process still makes a shard."""
        for path in self.folder.glob(".shard-*.lock"):
            with locked(path, f"{self.folder}: a process of an earlier job still works here; wait for it"):
                pass
        self.remove_temporaries()
        for path in self.folder.glob("shard-*"):
            shutil.rmtree(path)
        (self.folder / MANIFEST).unlink(missing_ok=True)
        with suppress(OSError):  # something else is in it, or it is gone
            self.folder.rmdir()
