"""Errors that come from outside the program, in one line with what to do: disk, memory, killed processes.

They strike one process alone, which raises ProcessFailure and ends; the others lose the connection to it, and the
launcher ends those that wait on a device.
"""

import errno
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch.utils.data import DataLoader

from rag_retrieval.train.steps import MicroBatch, unpack
from rag_retrieval.train.task import ProcessFailure, TrainingError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}
GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
MIN_FREE_BYTES = 1 << 22  # a disk with less is called full: the last write may have left a rest
RUST_ERROR = re.compile(r"\(os error (\d+)\)")
TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container|Parent directory .* does not exist")
CPU_MEMORY = re.compile(r"can't allocate memory|not enough memory|Cannot allocate memory|bad_alloc")
DEATH_SECONDS = 10.0  # between the end of a process's sockets and its own
PEER_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited")
PEER_SILENT = re.compile(r"Timed out waiting|Socket Timeout|timed out|timeout of \d+ ?ms", re.IGNORECASE)


@contextmanager
def translate_storage_errors(output_dir: Path) -> Iterator[None]:
    """Raise ProcessFailure for an error in writing to `output_dir`; other errors pass. Only for blocks that write
    there: a full disk elsewhere gives the same error, without the name of a file."""
    try:
        yield
    except TrainingError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = storage_cause(error, output_dir)
        if cause is None:
            raise
        raise ProcessFailure(
            f"output_dir {output_dir}: {cause}. Checkpoints written before are intact; then continue with --resume auto"
        ) from error


def storage_cause(error: Exception, output_dir: Path) -> str | None:
    """What is wrong with the folder and what to do; None where the error is not of writing to it."""
    number = _error_number(error, output_dir)
    if number is None:
        return None
    if not output_dir.is_dir():
        return "the folder is gone, removed or unmounted in the run. Bring it back with its checkpoints"
    free = shutil.disk_usage(output_dir).free
    if number in FULL or free < MIN_FREE_BYTES:
        return f"no space left to write ({free / 1e9:.2f} GB free; {error}). Make room, or lower num_max_checkpoints"
    if number in CLOSED:
        return f"cannot be written to ({error}). Mend its rights or mount"
    return f"writing failed ({error}). Look at the disk"


def _error_number(error: Exception, output_dir: Path) -> int | None:
    """The system's number of a failed write; EIO where a library hides it; None for other errors."""
    if isinstance(error, OSError):
        inside = error.filename is None or Path(str(error.filename)).absolute().is_relative_to(output_dir.absolute())
        known = FULL | CLOSED | GONE | {errno.EIO}
        return error.errno if inside and error.errno in known else None
    if isinstance(error, SafetensorError):
        match = RUST_ERROR.search(str(error))
        return int(match[1]) if match else None
    return errno.EIO if TORCH_WRITER.search(str(error)) else None


def is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or bool(CPU_MEMORY.search(str(error)))


def memory_failure(
    error: RuntimeError, step: int, where: str, configuration: Mapping[str, Any], advice: str
) -> ProcessFailure:
    """where: what the step was at. configuration: of the run. advice: the keys that it names are shown as they are."""
    named = [key for key in re.findall(r"\w+", advice) if key in configuration]
    keys = ", ".join(f"{key} {configuration[key]}" for key in dict.fromkeys(named))
    first = str(error).strip().partition("\n")[0]
    return ProcessFailure(
        f"out of memory in step {step}, {where}; settings: {keys}. {advice} The allocator says: {first}"
    )


@contextmanager
def translate_worker_deaths() -> Iterator[None]:
    """Raise ProcessFailure where torch says that a data loading process was killed: it does so from its handler of
    SIGCHLD, at any place of the main thread."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise worker_death(str(error)) from error


def steps_of(loader: DataLoader, pin_memory: bool = False) -> Iterator[list[MicroBatch]]:
    """The micro-batches of each step of a `step_loader`. Its processes end with this generator: close it. Raises
    ProcessFailure where they cannot be started, or where one was killed, which shows first as a broken connection: the
    signal of a death comes after its sockets close."""
    try:
        steps = iter(loader)
    except OSError as error:
        if error.errno != errno.ENOSPC:
            raise
        raise ProcessFailure(
            "data loading processes cannot be started: no shared memory (/dev/shm) is left for their queues; give the "
            f"container more (docker run --shm-size), or set num_workers: 0 (it is {loader.num_workers})"
        ) from error
    workers = steps._workers if loader.num_workers else []
    try:
        yield from (unpack(step, pin_memory) for step in steps)
    except (OSError, EOFError) as error:
        # an error of the data themselves has the same types, but leaves its process alive
        ended = wait([worker.sentinel for worker in workers], timeout=DEATH_SECONDS)
        if not ended:
            raise
        dead = next(worker for worker in workers if worker.sentinel in ended)
        dead.join(DEATH_SECONDS)
        raise worker_death(f"process {dead.pid} with exit code {dead.exitcode}") from error
    finally:
        if workers:  # a traceback may keep the iterator alive, and torch's handler would then raise later
            steps._shutdown_workers()


def worker_death(what: str) -> ProcessFailure:
    return ProcessFailure(
        f"a data loading process ended: {what}. If the system killed it because memory ran out (exit code -9), lower "
        "num_workers or free memory; then continue with --resume auto"
    )


def peer_failure(error: BaseException, wait_minutes: float) -> str | None:
    """What happened to another process of the run, so that this one could not talk to it; None for other errors."""
    if not isinstance(error, RuntimeError):
        return None
    if PEER_GONE.search(str(error)):
        return "another process of this run has ended; look at what it printed. One that printed nothing was killed"
    if PEER_SILENT.search(str(error)):
        return (
            f"another process of this run has not answered for {wait_minutes:g} minutes (wait_minutes) and is still "
            "there; look at what it does, or raise wait_minutes where it has that much to read or to write"
        )
    return None
