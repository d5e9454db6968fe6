"""What a run reports: a progress bar or log lines, `metrics.jsonl`, and tensorboard or wandb.

`metrics.jsonl` is always written and survives a resume: lines after the step that training resumes from are
cut, so that every step stands there once.
"""

import json
import logging
import math
import os
import time
from pathlib import Path

from accelerate import Accelerator

from rag_retrieval.core.files import write_text
from rag_retrieval.core.log import Progress
from rag_retrieval.train.failures import translate_storage_errors
from rag_retrieval.train.run_folder import METRICS_FILE, TRACKER_FOLDER

logger = logging.getLogger(__name__)

PROJECT = "rag_retrieval"


class LogWindow:
    """Means over the steps since the last log line."""

    def __init__(self, num_processes: int, unit: str):
        self.num_processes, self.unit = num_processes, unit
        self.started = time.monotonic()
        self.steps = self.size = self.skipped = 0
        self.lr = 0.0
        self.losses: dict[str, list[float]] = {}  # by part of the data
        self.norm: float | None = None

    def add(self, loss: float, norm: float | None, size: int, lr: float, part: str = "") -> None:
        """One step. norm: not finite where the fp16 scaler skipped the step. size: of this process, in `unit`. part:
        the data set that the step was of, "" where there is but one."""
        self.steps += 1
        self.losses.setdefault(part, []).append(loss)
        self.size += size
        self.norm, self.lr = norm, lr
        self.skipped += norm is not None and not math.isfinite(norm)

    def pause(self, seconds: float) -> None:
        """Take time that was not spent on steps out of the throughput."""
        self.started += seconds

    def values(self) -> dict[str, float]:
        """loss: mean over steps, and as loss/PART over those of each data set, where there are several; lr and
        grad_norm: of the last step; UNIT_per_second: over all processes."""
        seconds = max(time.monotonic() - self.started, 1e-9)
        values = {
            "loss": sum(map(sum, self.losses.values())) / self.steps,
            "lr": self.lr,
            f"{self.unit}_per_second": self.size * self.num_processes / seconds,
        }
        if self.norm is not None and math.isfinite(self.norm):
            values["grad_norm"] = self.norm
        values |= {f"loss/{part}": sum(losses) / len(losses) for part, losses in self.losses.items() if part}
        return values | ({"skipped_steps": self.skipped} if self.skipped else {})


class MetricsFile:
    """One JSON object per line, flushed as written; every line has `step`."""

    def __init__(self, path: Path, resumed_step: int):
        self.path = path
        kept = []
        if path.exists() and resumed_step:
            lines = path.read_text(encoding="utf-8").splitlines()
            kept = [line for line in lines if _step_of(line) <= resumed_step]
        write_text(path, "".join(line + "\n" for line in kept))

    def write(self, record: dict) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record, allow_nan=False) + "\n")


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except (json.JSONDecodeError, KeyError, TypeError):
        return math.inf  # the last line of a killed run may be cut in the middle


class Tracking:
    """Everything a run reports, on the main process; the other processes write nothing."""

    def __init__(
        self, accelerator: Accelerator, output_dir: Path, total_steps: int, done: int, run_config: dict, unit: str
    ):
        self.accelerator, self.output_dir, self.total_steps, self.unit = accelerator, output_dir, total_steps, unit
        self.shown = accelerator.is_main_process
        if not self.shown:
            return
        with translate_storage_errors(output_dir):
            self.file = MetricsFile(output_dir / METRICS_FILE, resumed_step=done)
            if accelerator.log_with:
                _start_tracker(accelerator, output_dir, run_config)
        # where there is no bar, a line for each report of training values
        self.progress = Progress(total_steps, "training", "steps", done, logged=False).start()

    def step_done(self) -> None:
        if self.shown:
            self.progress.update()

    def train(self, step: int, values: dict[str, float]) -> None:
        """Report training values over the steps since the last report."""
        if not self.shown:
            return
        self._write(step, "train", values)
        losses = "  ".join(f"{name} {value:.4f}" for name, value in values.items() if name.split("/")[0] == "loss")
        brief = f"{losses}  lr {values['lr']:.2e}  {values[f'{self.unit}_per_second']:.0f} {self.unit}/s"
        if self.progress.bar:
            self.progress.note = brief
        else:
            logger.info("step %d/%d  %s  %s left", step, self.total_steps, brief, self.progress.time_left())

    def evaluation(self, step: int, values: dict[str, float], note: str) -> None:
        if not self.shown:
            return
        self._write(step, "eval", values)
        shown = {name: f"{value:.4f}" if isinstance(value, float) else value for name, value in values.items()}
        text = "  ".join(f"{name} {value}" for name, value in shown.items())
        self.say(f"evaluation at step {step}: {text}{note}")

    def say(self, text: str) -> None:
        """A line, above the bar where there is one."""
        if self.shown:
            logger.info(text)

    def _write(self, step: int, kind: str, values: dict[str, float]) -> None:
        with translate_storage_errors(self.output_dir):
            self.file.write({"step": step, "kind": kind, **values})
            if self.accelerator.log_with:
                self.accelerator.log({f"{kind}/{name}": value for name, value in values.items()}, step=step)

    def close(self) -> None:
        """Also after an error: what was logged reaches the tracker, and the terminal is left clean."""
        if not self.shown:
            return
        self.progress.stop()
        for tracker in self.accelerator.trackers:
            tracker.finish()


def _start_tracker(accelerator: Accelerator, output_dir: Path, run_config: dict) -> None:
    folder = output_dir / TRACKER_FOLDER
    folder.mkdir(parents=True, exist_ok=True)
    _wandb_without_account()
    # tensorboard's hyperparameters are numbers and texts: neither None nor lists
    plain = {key: value if isinstance(value, (int, float, str)) else str(value) for key, value in run_config.items()}
    accelerator.init_trackers(
        PROJECT, config=plain, init_kwargs={"wandb": {"dir": str(folder), "name": output_dir.resolve().name}}
    )


def _wandb_without_account() -> None:
    """wandb asks for an account on the terminal; a run that has none is recorded offline instead."""
    if "WANDB_MODE" in os.environ or "WANDB_API_KEY" in os.environ:
        return
    netrc = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
    if not (netrc.exists() and "wandb" in netrc.read_text(errors="replace")):
        os.environ["WANDB_MODE"] = "offline"
