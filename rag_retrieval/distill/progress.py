"""How far all processes together are, on the main one: a bar with the time left, or a log line every minute.

What a reader would get wrong: the processes do not talk; what the others have finished is read off the folder, after
each of the main process's own parts.
"""

import logging
import time

from tqdm.auto import tqdm

from rag_retrieval.distill.parts import Part, PartFolder

logger = logging.getLogger(__name__)

LOG_EVERY = 60.0  # seconds


class Progress:
    """shown: False on all processes but the main one."""

    def __init__(self, folder: PartFolder, parts: list[Part], shown: bool):
        self.folder, self.waiting, self.shown = folder, parts, shown
        self.total = sum(part.pairs for part in parts)
        self.before = self.done = self._newly_finished()
        self.started = self.logged = time.monotonic()
        # None: tqdm's own way to say, unless the output is a terminal
        disable = None if shown else True
        self.bar = tqdm(total=self.total, initial=self.done, unit=" pairs", desc="scoring", disable=disable)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error) -> None:
        self.bar.close()

    def update(self) -> None:
        """After a part of the main process."""
        if not self.shown:
            return
        new = self._newly_finished()
        self.done += new
        self.bar.update(new)
        now = time.monotonic()
        if self.bar.disable and now - self.logged >= LOG_EVERY:
            self.logged = now
            logger.info("scored %s", self.describe(now - self.started))

    def describe(self, seconds: float) -> str:
        rate = (self.done - self.before) / seconds
        left = tqdm.format_interval((self.total - self.done) / rate)
        return f"{self.done:,} of {self.total:,} pairs, {rate:,.1f} pairs a second, {left} left"

    def _newly_finished(self) -> int:
        finished = {part for part in self.waiting if self.folder.is_finished(part)}
        self.waiting = [part for part in self.waiting if part not in finished]
        return sum(part.pairs for part in finished)
