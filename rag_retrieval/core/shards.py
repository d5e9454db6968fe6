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
import logging
import os
import re
import shutil
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rag_retrieval.core.command import CommandFailure, load_object
from rag_retrieval.core.config import LOCAL, EngineOptions
from rag_retrieval.core.distributed import SLOWEST, on_all, on_main, own_device, process_index
from rag_retrieval.core.files import flush_one, flush_to_disk, locked, read_json, write_json
from rag_retrieval.core.log import Progress

logger = logging.getLogger(__name__)

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

    open: "module:function", called once in each worker, before its first shard, as `open(device, **arguments)`; it
    returns make(number, folder), which writes the files of shard `number` into the empty folder, and may yield how many
    of its texts are done since, for the progress. device: torch.device. arguments: small and picklable, such as paths
    and options, never data.
    """

    open: str
    arguments: dict[str, Any]

    def open_here(self) -> MakeShard:
        return load_object(self.open)(own_device(), **self.arguments)


def run_shards(
    folder: Path,
    made_from: dict[str, Any],
    sizes: Sequence[int],
    work: ShardWork,
    engine: EngineOptions = LOCAL,
    *,
    description: str = "working",
    unit: str = "texts",
    overwrite: bool = False,
) -> list[Path]:
    """Make the shards that `folder` does not have yet. Returns the folders of all, in their order.

    Under `accelerate launch` every process of the group calls it, and whoever is free takes the next shard; all return
    when all shards are there. made_from: all that the shards depend on, by name, as JSON values. sizes: how many of
    `unit` each shard has, for the progress that is shown as `description`. overwrite: whether shards made from
    something else are removed.

    Raises ValueError where another job works in the folder, for shards made from something else, with each name that
    differs, and for a folder that holds other things; ShardError for a shard that nobody could make; and what `open`
    and make raise. Shards that are finished by then stay.
    """
    shards = ShardFolder(folder)
    with ExitStack() as lock:  # which the main process alone takes
        on_main(lambda: shards.begin(made_from, len(sizes), overwrite, lock))
        done = on_main(lambda: [number for number in range(len(sizes)) if shards.is_finished(number)])
        missing = sorted(set(range(len(sizes))).difference(done))
        total, before, shown = sum(sizes), sum(sizes[number] for number in done), Counter()
        if done:
            logger.info("%s: %s of %s %s were done before", folder, f"{before:,}", f"{total:,}", unit)
        with Progress(total, description, unit, before, shown=process_index() == 0) as progress:

            def report(number: int, count: int | None = None) -> None:
                count = sizes[number] - shown[number] if count is None else count
                shown[number] += count
                progress.update(count)

            if engine.engine == "ray" and missing:
                from rag_retrieval.core.ray_engine import make_with_ray

                on_main(lambda: make_with_ray(shards, missing, work, engine, report))
            else:
                on_all(lambda: make_locally(shards, missing, cache(work.open_here), report))
        on_main(shards.remove_temporaries)
    return [shards.path(number) for number in range(len(sizes))]


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


def remove_shards(folder: Path) -> None:
    """The shards and the manifest; the folder too unless something else is in it."""
    ShardFolder(folder).remove()


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
