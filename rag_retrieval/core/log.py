"""What a person sees of a long job: log lines on stderr, and a live bar where stderr is a terminal.

Nothing heavy is imported before it is needed: every command starts here.
"""

import logging
import os
import sys
import time
from contextlib import suppress
from datetime import timedelta
from functools import cache
from threading import Lock
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rich.console import Console, Group
    from rich.live import Live

logger = logging.getLogger(__name__)

LOG_EVERY = 60.0  # seconds between two lines of a job where stderr is a file
BAR_WIDTH = 12  # columns

_in_command = False


def launched_processes() -> int:
    """How many a launcher started; 1 without a launcher."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def launched_rank() -> int:
    """This process's rank among those that a launcher started, else 0. RANK alone says nothing: clusters set it."""
    return int(os.environ.get("RANK") or 0) if launched_processes() > 1 else 0


def set_up_logging() -> None:
    """Of a command: our lines from the first process alone; warnings of other libraries."""
    global _in_command
    _in_command = True
    root = logging.getLogger()
    if not root.handlers:
        root.addHandler(_ConsoleHandler())
        root.handlers[0].setFormatter(logging.Formatter("%(asctime)s %(message)s", "%H:%M:%S"))
    logging.getLogger("rag_retrieval").setLevel(logging.INFO if launched_rank() == 0 else logging.ERROR)
    # an installed DeepSpeed warns of a missing GPU when accelerate imports it, in a run without DeepSpeed too
    logging.getLogger("DeepSpeed").addFilter(lambda record: record.module != "real_accelerator")
    logging.getLogger("huggingface_hub").propagate = False  # it prints its own lines, which would come twice
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    if not sys.stderr.isatty():  # read by huggingface_hub and transformers where a command imports them later
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    quiet_transformers()


def quiet_transformers() -> None:
    """In a command, which shows its own progress: no warnings and no bar of a loading model. It is for what has been
    imported, so the module that loads models calls it again."""
    if _in_command and (transformers := sys.modules.get("transformers")):
        transformers.logging.set_verbosity_error()
        transformers.utils.logging.disable_progress_bar()


@cache
def _console() -> "Console":
    """The one that the bar is drawn on, so that lines appear above it."""
    from rich.console import Console

    return Console(stderr=True)


class _ConsoleHandler(logging.Handler):
    def emit(self, record: logging.LogRecord) -> None:
        with suppress(OSError):  # stderr is full, and there is no other place to say so
            # a terminal would break the line inside a word; a line of a file stays whole
            whole = not _console().is_terminal
            _console().print(self.format(record), markup=False, highlight=False, emoji=False, soft_wrap=whole)


class Progress:
    """`with Progress(total, "encoding", "documents") as progress: progress.update(n)`, from any thread

    total: in `unit`; the unit B is shown as kB, MB and so on. done: of total, what an earlier run has finished; speed
    and time left are computed from the rest. shown: False on all processes but the first. A live bar on a terminal and
    in a notebook, with `note` behind it; elsewhere a log line every `LOG_EVERY` seconds, where `logged`.
    """

    def __init__(
        self, total: int, description: str, unit: str, done: int = 0, shown: bool = True, logged: bool = True
    ):
        self.description, self.unit, self.note = description, unit, ""
        self.total, self.before, self.done = total, done, done
        self.shown, self.logged, self.lock = shown, logged, Lock()
        self.started = self.last_line = time.monotonic()
        self.bar: Live | None = None

    def __enter__(self) -> "Progress":
        return self.start()

    def __exit__(self, *error) -> None:
        self.stop()

    def start(self) -> "Progress":
        if self.shown and (sys.stderr.isatty() or _console().is_jupyter):
            from rich.live import Live

            self.bar = Live(console=_console(), get_renderable=self._display, redirect_stdout=False)
            self.bar.start()
        return self

    def stop(self) -> None:
        if self.bar:
            self.bar.stop()

    def update(self, count: int = 1) -> None:
        now = time.monotonic()
        with self.lock:
            self.done += count
            line_is_due = self.shown and self.logged and not self.bar and now - self.last_line >= LOG_EVERY
            if line_is_due:
                self.last_line = now
        if line_is_due:
            logger.info("%s: %s", self.description, self.describe())

    def describe(self, seconds: float | None = None) -> str:
        """`1,500/4,000 pairs, 10.0/s, 0:04:10 left`. seconds: since the beginning; absent: until now."""
        rate, left = self._rate(seconds), self.time_left(seconds)
        if self.unit == "B":
            from rich.filesize import decimal

            return f"{decimal(self.done)}/{decimal(self.total)}, {decimal(int(rate))}/s, {left} left"
        return f"{self.done:,}/{self.total:,} {self.unit}, {rate:,.1f}/s, {left} left"

    def time_left(self, seconds: float | None = None) -> str:
        """0:04:10, or ? before anything is done."""
        rate = self._rate(seconds)
        return str(timedelta(seconds=round((self.total - self.done) / rate))) if rate else "?"

    def _rate(self, seconds: float | None) -> float:
        """Per second, of what this run has done."""
        seconds = time.monotonic() - self.started if seconds is None else seconds
        return (self.done - self.before) / seconds if seconds > 0 else 0.0

    def _display(self) -> "Group":
        """A line for the bar and one for the note, each cut to the terminal; the numbers are whole."""
        from rich.cells import cell_len
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        numbers = self.describe()
        room = max(1, _console().width - BAR_WIDTH - len(numbers) - 2)
        row = Table.grid(padding=(0, 1))
        for width in (min(room, cell_len(self.description)), BAR_WIDTH, len(numbers)):
            row.add_column(no_wrap=True, overflow="ellipsis", width=width)
        row.add_row(self.description, ProgressBar(self.total, self.done, width=BAR_WIDTH), numbers)
        return Group(row, Text(self.note, no_wrap=True, overflow="ellipsis")) if self.note else Group(row)
