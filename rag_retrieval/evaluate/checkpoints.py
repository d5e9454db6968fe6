"""Every checkpoint of a training run, measured alike, and the curve of its figures over the optimizer steps.

    checkpoint-N/       the evaluation of each, in output_dir
    checkpoints.json    a row for each: step and means; the best by the first measure
    report.html         the curve
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rag_retrieval.core.files import write_json
from rag_retrieval.core.log import launched_rank
from rag_retrieval.core.terminal import plain_table, rendered
from rag_retrieval.evaluate.config import EvaluationConfig
from rag_retrieval.evaluate.evaluation import evaluate_reranker
from rag_retrieval.evaluate.output import write_evaluation
from rag_retrieval.evaluate.retrieval import evaluate_retriever
from rag_retrieval.evaluate.retrieval_config import RetrievalEvaluationConfig
from rag_retrieval.evaluate.retrieval_output import write_retrieval
from rag_retrieval.evaluate.systems import check_matplotlib, default_output_dir
from rag_retrieval.metrics import means
from rag_retrieval.train.checkpoints import CheckpointStore
from rag_retrieval.train.run_folder import read_run

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from rag_retrieval.evaluate.systems import Evaluation

AnyConfig = EvaluationConfig | RetrievalEvaluationConfig


@dataclass(frozen=True)
class CheckpointFigures:
    """step: optimizer steps behind the weights. means: by measure."""

    step: int
    folder: str
    means: dict[str, float]


@dataclass(frozen=True)
class CheckpointCurve:
    """checkpoints: by step. best: the one with the highest first measure, the earliest of equal ones."""

    config: AnyConfig
    data: str
    checkpoints: list[CheckpointFigures]
    best: CheckpointFigures
    output_dir: Path


def evaluate_checkpoints(config: AnyConfig) -> CheckpointCurve:
    """Measure every checkpoint of the run `config.checkpoints`, and its final model, as `config` says.

    The run is one of an embedder, or of a reranker: with retrievers it reranks what they find. A checkpoint that was
    measured before is taken from `config.output_dir`. Raises ValueError for a folder that is no run or has no
    checkpoint.
    """
    check_matplotlib()
    run = Path(config.checkpoints)
    output_dir = Path(config.output_dir or default_output_dir(f"{run.name}-checkpoints", Path(config.data).name))
    rows, last = [], None
    for step, folder in checkpoints_of(run):
        last = evaluate_one(config, folder, output_dir / f"checkpoint-{step}")
        rows.append(CheckpointFigures(step, str(folder), means(last.after.per_query)))
    best = max(rows, key=lambda row: row.means[config.measures[0]])
    return CheckpointCurve(config, last.data.name, rows, best, output_dir)


def checkpoints_of(run: Path) -> list[tuple[int, Path]]:
    """(step, model's folder) of each checkpoint, and of the final model where no checkpoint has its step."""
    about = read_run(run)
    if not about:
        raise ValueError(f"checkpoints: {run} is not the output_dir of a training run; expected one with a run.json")
    found = {step: folder / "model" for step, folder in CheckpointStore(run, about["run_id"], keep=1).own()}
    if about.get("finished") and (run / "model").is_dir():
        found.setdefault(about["model_step"], run / "model")
    if not found:
        raise ValueError(f"checkpoints: {run} has no checkpoint yet; wait for the first, or set save_steps")
    return sorted(found.items())


def evaluate_one(config: AnyConfig, model: Path, output_dir: Path) -> "Evaluation":
    own = {"checkpoints": None, "output_dir": str(output_dir), "report": False}
    if isinstance(config, EvaluationConfig):
        evaluation, write = evaluate_reranker(config.model_copy(update=own | {"model": str(model)})), write_evaluation
    elif config.retriever == (config.checkpoints,):
        evaluation = evaluate_retriever(config.model_copy(update=own | {"retriever": (str(model),)}))
        write = write_retrieval
    else:
        update = own | {"reranker": str(model)}
        evaluation = evaluate_retriever(config.model_copy(update=update), output_dir.parent / "indexes")
        write = write_retrieval
    if launched_rank() == 0:
        write(evaluation)
    return evaluation


# ---- files and text


def write_curve(curve: CheckpointCurve) -> None:
    """checkpoints.json, report.html and figures/ in the output_dir."""
    from rag_retrieval.evaluate import report

    rows = [asdict(row) for row in curve.checkpoints]
    about: dict[str, Any] = {"data": curve.data, "checkpoints": rows, "best": asdict(curve.best)}
    write_json(curve.output_dir / "checkpoints.json", about | {"config": curve.config.model_dump(mode="json")})
    images = report.save_figures(curve.output_dir, {"checkpoints": curve_figure(curve)})
    names = curve.config.measures
    rows = [report.row(cells[0], cells[1:], "strong" if mark else "") for mark, cells in marked_rows(curve)]
    body = [*report.section("Figures by optimizer step", images, ["checkpoints"])]
    body += ["<h2>Checkpoints</h2>", report.html_table(("step", *names), rows)]
    report.write_page(curve.output_dir, f"{Path(curve.config.checkpoints).name} on {curve.data}", body)


def marked_rows(curve: CheckpointCurve) -> list[tuple[bool, tuple[str, ...]]]:
    """(whether it is the best, step and figures) of each."""
    return [
        (row is curve.best, (f"{row.step:,}", *(f"{row.means[name]:.4f}" for name in curve.config.measures)))
        for row in curve.checkpoints
    ]


def describe_curve(curve: CheckpointCurve, columns: int) -> str:
    rows = [(f"{'*' if mark else ' '} {cells[0]}", *cells[1:]) for mark, cells in marked_rows(curve)]
    title = f"{curve.config.checkpoints} on {curve.data}; * the best by {curve.config.measures[0]}\n"
    end = f"\n{curve.best.folder}\nwritten to {curve.output_dir}; the page: report.html"
    return rendered([title, plain_table(("  step", *curve.config.measures), rows), end], columns)


def curve_figure(curve: CheckpointCurve) -> "Figure":
    """Every measure over the steps; the best step is marked."""
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    from rag_retrieval.evaluate.report import CURVE_COLORS, GREY, WIDE, finish_axes

    figure = Figure(figsize=(WIDE[0], 4.2), layout="constrained")
    axes = figure.subplots()
    steps = [row.step for row in curve.checkpoints]
    for place, name in enumerate(curve.config.measures):
        values = [row.means[name] for row in curve.checkpoints]
        axes.plot(steps, values, "o-", label=name, color=CURVE_COLORS[place % len(CURVE_COLORS)], markersize=4)
    axes.axvline(curve.best.step, color=GREY, linestyle=":", linewidth=1.2)
    best = curve.best.means[curve.config.measures[0]]
    axes.plot([curve.best.step], [best], "*", color=CURVE_COLORS[0], markersize=13)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.legend(frameon=False, loc="outside right center", fontsize=8)
    finish_axes(axes, f"best by {curve.config.measures[0]}: {best:.4f} at step {curve.best.step:,}", "step", "")
    return figure
