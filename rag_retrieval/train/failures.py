"""Errors that come from outside the program, told in one line with what to do: disk, memory, killed processes.

What a reader would get wrong: they strike one process alone. It says so itself (`ProcessFailure`) and leaves; the
others find the line to it dead, and the launcher ends those that wait on a device.
"""

import errno
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from rag_retrieval.train.task import ProcessFailure, TrainingError

FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
CLOSED = {errno.EROFS, errno.EACCES, errno.EPERM}
GONE = {errno.ENOENT, errno.ENOTDIR, errno.ESTALE}
LITTLE = 1 << 22  # bytes; a disk with less free is called full: the last write may have left a rest
RUST_ERROR = re.compile(r"\(os error (\d+)\)")
TORCH_WRITER = re.compile(r"PytorchStreamWriter|inline_container|Parent directory .* does not exist")
CPU_MEMORY = re.compile(r"can't allocate memory|not enough memory|Cannot allocate memory|bad_alloc")
MEMORY_KEYS = ("max_tokens_per_batch", "batch_size", "gradient_checkpointing", "max_len", "mixed_precision")
PEER_GONE = re.compile(r"Connection (closed|reset) by peer|Broken pipe|remote process exited|Socket Timeout")


@contextmanager
def told_of_storage(output_dir: Path) -> Iterator[None]:
    """Raise ProcessFailure for an error in writing to `output_dir`; other errors pass."""
    try:
        yield
    except TrainingError:
        raise
    except (OSError, RuntimeError, SafetensorError) as error:
        cause = storage_cause(error, output_dir)
        if cause is None:
            raise
        raise ProcessFailure(
            f"output_dir {output_dir}: {cause}. Checkpoints written before are intact; then go on with --resume auto"
        ) from error


def storage_cause(error: Exception, output_dir: Path) -> str | None:
    """What is wrong with the folder and what to do; None where the error is not of writing to it."""
    number = _error_number(error, output_dir)
    if number is None:
        return None
    if not output_dir.is_dir():
        return "the folder is gone, removed or unmounted in the run. Bring it back with its checkpoints"
    free = shutil.disk_usage(output_dir).free
    if number in FULL or free < LITTLE:
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


def memory_failure(error: RuntimeError, step: int, where: str, configuration: Mapping[str, Any]) -> ProcessFailure:
    """where: what the step was at. configuration: of the run."""
    keys = ", ".join(f"{key} {configuration[key]}" for key in MEMORY_KEYS if key in configuration)
    first = str(error).strip().partition("\n")[0]
    return ProcessFailure(
        f"out of memory in step {step}, {where}; settings: {keys}. Lower max_tokens_per_batch, or batch_size with "
        "gradient_accumulation_steps raised as much: the step stays the same. Or set gradient_checkpointing true, "
        f"mixed_precision bf16, or a smaller max_len. The allocator says: {first}"
    )


@contextmanager
def told_of_loaders() -> Iterator[None]:
    """Raise ProcessFailure where a data loading process was killed: torch tells it at any place, from a handler of
    SIGCHLD, and not only where the next step is asked for."""
    try:
        yield
    except RuntimeError as error:
        if not str(error).startswith("DataLoader worker"):
            raise
        raise ProcessFailure(
            f"a data loading process ended: {error}. Most often the system kills one when memory runs out: lower "
            "num_workers or free memory; then go on with --resume auto"
        ) from error


def is_peer_gone(error: BaseException) -> bool:
    """Whether another process of the run ended, so that this one could not talk to it."""
    return isinstance(error, RuntimeError) and bool(PEER_GONE.search(str(error)))
