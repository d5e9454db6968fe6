"""Several processes of `accelerate launch` or torchrun that share a work; one alone needs none of this.

A process that raises alone leaves the others waiting for it. What one does for all goes through `on_main`, what each
does for itself through `on_all`: both end in the same way on every process. torch is imported where there is such a
group, or a device is asked for.
"""

import importlib
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, TypeVar

from rag_retrieval.core.command import CommandFailure
from rag_retrieval.core.log import launched_processes

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

SLOWEST = timedelta(hours=12)  # without any exchange between processes: they score their shares of a corpus

Result = TypeVar("Result")


class StartError(ValueError):
    """A user's mistake that is found before training. Raised by all processes alike."""


class RankLocalStartError(StartError):
    """The same, raised by this process; the others may know nothing of it, or have a PeerError."""


class PeerError(CommandFailure):
    """Another process failed, and this one stops with it."""

    exit_code = 2
    on_all_processes = True


@contextmanager
def user_errors_to_start_error() -> Iterator[None]:
    """Raise ValueError and OSError as RankLocalStartError: before training they are the user's, afterwards ours."""
    try:
        yield
    except StartError:
        raise
    except (ValueError, OSError) as error:
        raise RankLocalStartError(str(error)) from error


@contextmanager
def process_group() -> Iterator[None]:
    """The group of the processes that a launcher started, for the time of the block; nothing without a launcher.

    gloo on every device: only settings, counts, texts and scores on the CPU are exchanged. Its threads end with the
    block: one that still releases a Python tensor while the interpreter exits aborts the process.
    """
    if launched_processes() == 1 or is_distributed():
        yield
        return
    import torch.distributed as dist

    # its functions take the default group of the time of import as a default argument, and would keep it alive
    importlib.import_module("torch.distributed.nn")
    dist.init_process_group("gloo", timeout=SLOWEST)
    try:
        yield
    finally:
        dist.destroy_process_group()


def is_distributed() -> bool:
    return process_count() > 1


def process_index() -> int:
    return sys.modules["torch.distributed"].get_rank() if is_distributed() else 0


def process_count() -> int:
    dist = sys.modules.get("torch.distributed")  # where nobody has imported it, there is no group
    return dist.get_world_size() if dist is not None and dist.is_available() and dist.is_initialized() else 1


def own_device() -> "torch.device":
    """The GPU of this process, else the CPU."""
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def on_main(work: Callable[[], Result]) -> Result:
    """What `work` gives on the main process, on every process. Where it raises, the others raise PeerError."""
    return gather(on_all(lambda: work() if process_index() == 0 else None))[0]


def on_all(work: Callable[[], Result]) -> Result:
    """What `work` gives on this process. Where it raises on any, every process raises: the first of those its own
    error, the others PeerError."""
    if not is_distributed():
        return work()
    result = error = None
    try:
        result = work()
    except Exception as raised:
        error = raised
    texts = gather(error and f"{type(error).__name__}: {error}")
    failed = [process for process, text in enumerate(texts) if text is not None]
    if not failed:
        return result
    if failed[0] == process_index():
        raise error
    raise PeerError(f"the work failed on process {failed[0]}: {texts[failed[0]]}") from error


def gather(value: Result, group: "dist.ProcessGroup | None" = None) -> list[Result]:
    """The values of all processes, in their order. group: None for the default one."""
    if not is_distributed():
        return [value]
    import torch.distributed as dist

    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value, group=group)
    return values


def host_group(wait_minutes: float) -> "dist.ProcessGroup | None":
    """A group of all processes for what lies on hosts, such as counts: asking a device for them would stall it. None
    for one process alone. wait_minutes: how long a process waits for another."""
    if not is_distributed():
        return None
    import torch.distributed as dist

    return dist.new_group(backend="gloo", timeout=timedelta(minutes=wait_minutes))
