"""Shards for tests: each is a file with its number; what is made is counted in a log that all processes append to."""

import os
import signal
import time
from collections.abc import Iterator
from pathlib import Path

from rag_retrieval.core.distributed import own_device
from rag_retrieval.core.shard_folder import ShardWork

LIMIT = 600  # seconds that anything here waits at most


def work(root: Path, **arguments) -> ShardWork:
    """root: a folder for the log and for the files that the arguments name."""
    return ShardWork("shard_samples:open_numbers", {"root": str(root), **arguments})


def open_numbers(root, text="a", failing=None, killing=None, kills=1, wait_for=None, wait_at=(), yields=0):
    """failing: a shard that raises. killing: one that kills its process, the first `kills` times. wait_at: shards that
    wait for root's file `wait_for`. yields: a count that each shard yields."""
    root = Path(root)
    append(root / "opened", f"{own_device()} {os.getcwd()}")

    def make(number: int, folder: Path) -> Iterator[int]:
        (folder / "half").touch()
        append(root / "begun", number)
        if number in wait_at:
            wait_until(lambda: (root / wait_for).exists())
        if number == killing and len(lines(root / "killed")) < kills:
            append(root / "killed", os.getpid())
            os.kill(os.getpid(), signal.SIGKILL)
        if number == failing:
            raise ValueError(f"shard {number} has a bad text")
        (folder / "half").unlink()
        (folder / "number").write_text(f"{text}{number}" * 1000)
        append(root / "made", number)
        yield yields

    return make


def append(file: Path, value) -> None:
    with file.open("a") as stream:
        stream.write(f"{value}\n")


def lines(file: Path) -> list[str]:
    return file.read_text().splitlines() if file.exists() else []


def wait_until(is_true) -> None:
    for _ in range(LIMIT * 50):
        if is_true():
            return
        time.sleep(0.02)
    raise TimeoutError


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of finished work."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}
