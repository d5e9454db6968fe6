"""What a training run wrote down step by step, as curves for the report.

The trap: a run folder's `metrics.jsonl` holds two kinds of lines, "train" and "eval", whose steps differ; and the
last line of a run that was killed may be cut.
"""

import json
from dataclasses import dataclass
from pathlib import Path

METRICS_FILE = "metrics.jsonl"
RANKING = ("ndcg@10", "mrr@10", "map")

Curve = list[tuple[int, float]]  # (optimizer step, value)


@dataclass(frozen=True)
class TrainingCurves:
    """Loss of training and validation, learning rate, and ranking metrics by name; empty where none was written."""

    train_loss: Curve
    eval_loss: Curve
    lr: Curve
    metrics: dict[str, Curve]


def find_run(training_run: str | None, model: str) -> Path | None:
    """The folder of the run that made a model: the one named, else the model folder's parent if it is a run's.

    Raises ValueError for a named folder without metrics.jsonl.
    """
    if training_run is None:
        parent = Path(model).absolute().parent
        return parent if Path(model).is_dir() and (parent / METRICS_FILE).is_file() else None
    if not (Path(training_run) / METRICS_FILE).is_file():
        raise ValueError(f"training_run: {training_run} has no {METRICS_FILE}; give the output_dir of a training run.")
    return Path(training_run)


def read_curves(run: Path) -> TrainingCurves:
    rows = []
    for line in (run / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    found = {name: _curve(rows, "eval", name) for name in RANKING}
    return TrainingCurves(
        _curve(rows, "train", "loss"),
        _curve(rows, "eval", "loss"),
        _curve(rows, "train", "lr"),
        {name: curve for name, curve in found.items() if curve},
    )


def _curve(rows: list[dict], kind: str, name: str) -> Curve:
    return [(row["step"], row[name]) for row in rows if row["kind"] == kind and name in row]
