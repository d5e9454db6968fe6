"""Several processes of `accelerate launch` or torchrun that share a work; one alone needs none of this.

What a reader would get wrong: what only the main process does (reading what is finished, writing files) must end on
every process in the same way, or the others wait for it for ever. `on_main` does that.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from rag_retrieval.core.command import CommandFailure

PATIENCE = timedelta(hours=12)  # for the slowest process

Result = TypeVar("Result")


class PeerError(CommandFailure):
    """Another process failed, and this one stops with it."""

    exit_code = 2
    on_all_processes = True


@contextmanager
def process_group() -> Iterator[None]:
    """The group of the processes that a launcher started, for the time of the block; nothing without a launcher.

    gloo on every device: only settings, counts, texts and scores on the CPU are exchanged.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or dist.is_initialized():
        yield
        return
    dist.init_process_group("gloo", timeout=PATIENCE)
    try:
        yield
    finally:
        dist.destroy_process_group()


def several() -> bool:
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def process_index() -> int:
    return dist.get_rank() if several() else 0


def process_count() -> int:
    return dist.get_world_size() if several() else 1


def on_main(work: Callable[[], Result]) -> Result:
    """What `work` gives on the main process, on every process; where it raises, every process raises."""
    if not several():
        return work()
    return gather(all_succeed(lambda: work() if process_index() == 0 else None))[0]


def on_all(work: Callable[[], Result]) -> Result:
    """What `work` gives on this process; where it raises on any, every process raises."""
    return all_succeed(work) if several() else work()


def own_device() -> torch.device:
    """The GPU of this process, else the CPU."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())


def all_succeed(work: Callable[[], Result]) -> Result:
    """What `work` gives on this process; where it raises on any, every process raises."""
    result, error = None, None
    try:
        result = work()
    except Exception as raised:
        error = raised
    errors = gather(None if error is None else f"{type(error).__name__}: {error}")
    if error is not None:
        raise error
    for process, text in enumerate(errors):
        if text is not None:
            raise PeerError(f"the work failed on process {process}: {text}")
    return result


def gather(value: Result) -> list[Result]:
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values
