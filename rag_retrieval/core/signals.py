"""SIGTERM (a node is taken away) and SIGINT (Ctrl-C), at each stage of a run.

While modules are imported there is nothing to lose, and an exception might be lost in C code: the process leaves with
one line. While data and model are read, the signal is an exception, so that half-built files are removed. In training
it is a request to stop, noted until the step is done and a checkpoint written; a second one leaves at once.

One Ctrl-C under torchrun arrives twice, from the terminal and from torchrun, and schedulers too signal both launcher
and processes. Signals within REPEAT of the first are the first.
"""

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

from rag_retrieval.core.log import launched_rank

STOPPING = (signal.SIGTERM, signal.SIGINT)
REPEAT = 3.0  # seconds; on a busy machine torchrun's comes a second later


class Interrupted(KeyboardInterrupt):
    """Signal `number` came while work was under way."""

    def __init__(self, number: int):
        super().__init__(number)
        self.number = number


class TrainingStopped(Exception):
    """Training stopped at signal `number` and is saved in a checkpoint. Raised by all processes alike."""

    def __init__(self, number: int, step: int, total_steps: int, checkpoint: str):
        super().__init__(
            f"stopped by {signal.Signals(number).name} after step {step} of {total_steps}, saved in {checkpoint}"
        )
        self.number = number


def exit_code(number: int) -> int:
    """As shells give it for a process that a signal ended: 143 for SIGTERM, 130 for SIGINT."""
    return 128 + number


@contextmanager
def on_signals(handler: Callable[[int, object], None]) -> Iterator[None]:
    """Handle both signals with `handler` in this block. Outside the main thread nothing changes."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in STOPPING}
    try:
        yield
    finally:
        for number, earlier in before.items():
            signal.signal(number, earlier)


def leave_at_once(number: int, frame: object) -> None:
    if launched_rank() == 0:
        with suppress(OSError):  # stderr may be closed
            os.write(2, f"error: interrupted by {signal.Signals(number).name}\n".encode())
    os._exit(exit_code(number))


def interrupt(number: int, frame: object) -> None:
    raise Interrupted(number)


class StopRequest:
    """Notes the first signal: `number` is 0 until one comes. `with on_signals(request.note): ...`"""

    def __init__(self):
        self.number = 0
        self.noted = 0.0

    def note(self, number: int, frame: object) -> None:
        if not self.number:
            self.number, self.noted = number, time.monotonic()
        elif time.monotonic() - self.noted > REPEAT:
            os._exit(exit_code(number))


def ignore_stop_in_worker(worker: int) -> None:
    """worker_init_fn of data loading processes: they outlive a signal that was sent to all, since the step under way
    needs their work. The parent ends them through their queue, and they look every 5 seconds whether it still lives."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)
