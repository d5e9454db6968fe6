"""Several processes that do the same work side by side, and the one that starts, watches and stops them.

Signals are for the parent alone: workers ignore them, since a terminal and some service managers send them to all. Each
worker has a pipe to the parent. It sends READY once it serves, or the message of the error for which it cannot; it
stops when something comes, and also when the pipe ends, because the parent has died. So no worker outlives the parent,
however that ends.
"""

import logging
import multiprocessing
import signal
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any

from rag_retrieval.core.command import CommandFailure
from rag_retrieval.core.signals import on_signals

READY = "ready"
STOP = "stop"

log = logging.getLogger(__name__)


@dataclass(eq=False)
class _Worker:
    process: BaseProcess
    pipe: Connection
    ready: bool = False


class Workers:
    """count: of processes that run `target(*arguments, pipe)`. stop_seconds: that one may take to stop; then it is
    killed. on_ready: called once all are ready for the first time. on_end: called with the id of a process that has
    ended while the others go on; another one is started in its place."""

    def __init__(
        self,
        count: int,
        target: Callable[..., None],
        arguments: Sequence[Any],
        stop_seconds: float,
        on_ready: Callable[[], None],
        on_end: Callable[[int], None],
    ):
        self.count, self.target, self.arguments, self.stop_seconds = count, target, arguments, stop_seconds
        self.on_ready, self.on_end = on_ready, on_end
        self.workers: list[_Worker] = []
        self.was_ready = False
        self.failure: Exception | None = None
        self.deadline: float | None = None  # for stopping
        # spawned: a fork would inherit the other workers' pipes, and threads of libraries in any state
        self._context = multiprocessing.get_context("spawn")

    def run(self) -> None:
        """Returns when a signal has stopped all. Raises ValueError with the message of a worker that cannot serve, and
        CommandFailure where one ends before it is ready."""
        self._woken, wake = socket.socketpair()
        with self._woken, wake, on_signals(lambda number, frame: wake.send(b"s")):
            try:
                for _ in range(self.count):
                    self._start()
                while self.workers:
                    self._wait()
            finally:
                self._kill()
        if self.failure is not None:
            raise self.failure

    def _start(self) -> None:
        own, of_worker = self._context.Pipe()
        process = self._context.Process(target=self.target, args=(*self.arguments, of_worker))
        process.start()
        of_worker.close()  # else this end would not see that the worker has ended
        self.workers.append(_Worker(process, own))

    def _wait(self) -> None:
        """For the next thing that happens."""
        left = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        happened = wait([self._woken, *(worker.pipe for worker in self.workers)], left)
        if not happened:
            log.warning("%d workers did not stop in %.0f s and are killed", len(self.workers), self.stop_seconds)
            self._kill()
        if self._woken in happened:
            self._woken.recv(1)
            self._stop() if self.deadline is None else self._kill()
        for worker in [worker for worker in self.workers if worker.pipe in happened]:
            try:
                self._hear(worker, worker.pipe.recv())
            except (EOFError, OSError):
                self._bury(worker)

    def _hear(self, worker: _Worker, message: str) -> None:
        if message != READY:
            self._fail(ValueError(message))
            return
        worker.ready = True
        if not self.was_ready and sum(each.ready for each in self.workers) == self.count:
            self.was_ready = True
            self.on_ready()

    def _bury(self, worker: _Worker) -> None:
        worker.process.join()
        worker.pipe.close()
        self.workers.remove(worker)
        if self.deadline is not None:
            return
        code = worker.process.exitcode
        how = f"by {signal.Signals(-code).name}" if code < 0 else f"with exit code {code}"
        if not worker.ready:
            self._fail(CommandFailure(f"the worker process {worker.process.pid} ended {how} before it was ready"))
            return
        log.error("the worker process %d ended %s; another one is started", worker.process.pid, how)
        self.on_end(worker.process.pid)
        self._start()

    def _fail(self, error: Exception) -> None:
        self.failure = self.failure or error
        self._stop()

    def _stop(self) -> None:
        """Ask all to stop; those that have taken no requests yet are killed."""
        self.deadline = self.deadline or time.monotonic() + self.stop_seconds
        for worker in self.workers:
            if not worker.ready:
                worker.process.kill()
                continue
            try:
                worker.pipe.send(STOP)
            except OSError:  # it has ended; its pipe says so next
                continue

    def _kill(self) -> None:
        for worker in self.workers:
            worker.process.kill()
        for worker in self.workers:
            worker.process.join()
            worker.pipe.close()
        self.workers = []


def ignore_signals() -> None:
    """In a worker."""
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
