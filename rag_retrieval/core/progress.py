"""How far a long job is: a bar with the time left on a terminal, elsewhere a log line now and then.

The trap: in a log file each redraw of a bar would be a line, and a job without any sign looks dead.
"""

import logging
import time

from tqdm.auto import tqdm

logger = logging.getLogger(__name__)

LOG_EVERY = 60.0  # seconds


class Progress:
    """`with Progress(total, "encoding", "documents") as progress: progress.update(n)`

    total: in `unit`; the unit B is shown as kB, MB and so on. done: of total, what an earlier run has finished; speed
    and time left are computed from the rest. shown: False on all processes but the main one.
    """

    def __init__(self, total: int, description: str, unit: str, done: int = 0, shown: bool = True):
        self.description, self.unit = description, unit
        self.total, self.before, self.done = total, done, done
        self.shown = shown
        self.started = self.logged = time.monotonic()
        self.bar = tqdm(
            total=total,
            initial=done,
            desc=description,
            unit=unit if unit == "B" else f" {unit}",
            unit_scale=unit == "B",
            dynamic_ncols=True,
            disable=None if shown else True,  # None is tqdm's own way to say: unless the output is a terminal
        )

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def update(self, count: int = 1) -> None:
        self.done += count
        self.bar.update(count)
        now = time.monotonic()
        if self.shown and self.bar.disable and now - self.logged >= LOG_EVERY:
            self.logged = now
            logger.info("%s: %s", self.description, self.describe(now - self.started))

    def describe(self, seconds: float) -> str:
        """`seconds`: since the beginning, above 0."""
        rate = (self.done - self.before) / seconds
        left = tqdm.format_interval((self.total - self.done) / rate) if rate else "?"
        return f"{self.done:,} of {self.total:,} {self.unit}, {rate:,.1f} a second, {left} left"
