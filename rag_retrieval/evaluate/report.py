"""The report of an evaluation: one HTML page that needs nothing beside it, and its figures as PNG files.

    report.html         figures inside, nothing loaded from elsewhere; of retrievers also their queries (query_view.py)
    figures/*.png       the same figures

Texts of queries and documents are data and may hold markup: every text of the page itself goes through `escape`.
`Figure` is used without pyplot, which keeps every figure in memory and asks for a display, and no text of the data is
drawn: matplotlib's own font has no Chinese.
"""

import base64
import io
import json
from collections import Counter
from collections.abc import Iterable, Sequence
from html import escape
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rag_retrieval.core.files import write_text
from rag_retrieval.core.terminal import on_one_line
from rag_retrieval.data.beir import Qrels, Run
from rag_retrieval.evaluate.calibration import reliability, scored_pairs
from rag_retrieval.evaluate.evaluation import RerankerEvaluation
from rag_retrieval.evaluate.output import (
    COMPARISON_HEAD,
    comparison_cells,
    describe_probabilities,
    describe_test,
)
from rag_retrieval.evaluate.systems import Evaluation, QueryChange, System
from rag_retrieval.metrics import means, parse_metric
from rag_retrieval.models.calibration import Calibration, probabilities_of
from rag_retrieval.retrieval import stage_view
from rag_retrieval.train.run_folder import METRICS_FILE

DPI = 150
LONGEST_TEXT = 190  # characters of a document's text
# Okabe and Ito's colours, which the colour-blind can tell apart
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#6b6b6b"
CURVE_COLORS = (BLUE, ORANGE, GREEN, "#cc79a7", "#e69f00", "#56b4e9", "#000000")
WIDE, SQUARE = (8.0, 3.2), (5.0, 4.6)  # inches

STYLE = """
body { margin: 2rem 1rem; }
.page { max-width: 60rem; margin: 0 auto; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid var(--line); padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; }
.note { color: var(--quiet); }
.scroll { overflow-x: auto; }
.scroll > table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
.scroll > table > * > tr > * { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid var(--line);
                               vertical-align: top; }
.scroll > table > * > tr > :is(:first-child, .text), .ranks th:last-child { text-align: left; }
td:first-child:not(.number) { min-width: 8rem; } td.text { min-width: 14rem; }
td.number { white-space: nowrap; }
tr.strong td { font-weight: 600; }
img { max-width: 100%; height: auto; display: block; margin: .6rem 0; background: #fff; }
.gain { color: var(--accent); } .loss { color: var(--down); }

/* the table of queries takes the width of the window; what a query opens into stays in view while the table scrolls */
.queries { max-width: 110rem; margin: 0 auto; }
.queries .scroll { container-type: inline-size; }
.queries .scroll > table { width: 100%; }
.queries th { overflow-wrap: normal; min-width: 5rem; }
.queries thead button { padding: 0 .2rem; border: 0; background: none; font-weight: 600; }
button.query { text-align: start; border: 0; background: none; padding: 0 .2rem; color: var(--accent); }
.queries .scroll > table > tbody > tr.opened > td { padding: .4rem 0 1.2rem; }
.of-query { position: sticky; left: 0; width: 100cqw; text-align: start; }
.places { border-collapse: collapse; margin: 0 0 1rem; display: block; overflow-x: auto; font-size: .9rem; }
.places th, .places td { padding: .1rem .8rem .1rem 0; text-align: start; font-weight: normal; vertical-align: top;
                         white-space: nowrap; }
.places td:first-child { min-width: 14rem; max-width: 30rem; white-space: normal; }
.places .beginning { display: -webkit-box; -webkit-box-orient: vertical; -webkit-line-clamp: 2; overflow: hidden; }
"""


def write_report(evaluation: RerankerEvaluation) -> Path:
    """report.html and figures/ in the evaluation's output_dir; the path of the page.

    Raises ValueError where the configuration names a training run that is none.
    """
    images = save_figures(evaluation.output_dir, draw_figures(evaluation))
    title = f"{evaluation.after.name} on {evaluation.data.name}"
    return write_page(evaluation.output_dir, title, body_of(evaluation, images))


def save_figures(output_dir: Path, figures: dict[str, Figure]) -> dict[str, bytes]:
    """As figures/NAME.png; the images by name."""
    folder = output_dir / "figures"
    folder.mkdir(exist_ok=True)
    images = {}
    for name, figure in figures.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", dpi=DPI)
        images[name] = buffer.getvalue()
        (folder / f"{name}.png").write_bytes(images[name])
    return images


def write_page(output_dir: Path, title: str, body: list[str], wide: Sequence[str] = (), script: str = "") -> Path:
    """report.html. body: HTML, without the title. wide: HTML below it that takes the whole width. script: for it."""
    page, style = output_dir / "report.html", stage_view.STYLE + STYLE
    write_text(
        page,
        f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{stage_view.content_policy(style, script)}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{escape(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n<div class="page">\n'
        f"<h1>{escape(title)}</h1>\n" + "\n".join(body) + "\n</div>\n" + "\n".join(wide)
        + (f"\n<script>{script}</script>" if script else "") + "\n</body>\n</html>\n",
    )  # fmt: skip
    return page


# ---- the page --------------------------------------------------------------------------------------------


def body_of(evaluation: RerankerEvaluation, images: dict[str, bytes]) -> list[str]:
    data, config = evaluation.data, evaluation.config
    facts = (
        f"{len(evaluation.measured):,} queries, {data.num_pairs:,} pairs; candidates from {data.source}, at most "
        f"{config.depth} for a query; a document of grade {config.relevant_from} or more is relevant"
    )
    body = [note(facts), "<h2>Figures</h2>"]
    rows = [evaluation.before, evaluation.after, evaluation.ceiling]
    body.append(systems_table(rows, evaluation.after, config.measures))
    body += comparison_section(evaluation)
    body += section("Gain of each query", images, ["gains"])
    body += changes_section(evaluation)
    if "training" in images:
        body += section("Training", images, ["training"])
    if evaluation.probabilities is not None:
        body += section("Scores and probabilities", images, ["scores", "reliability"])
        body.append(note(describe_probabilities(evaluation.probabilities)))
    return body + section("Data", images, [name for name in ("grades", "tokens") if name in images])


def note(text: str) -> str:
    return f'<p class="note">{escape(text)}</p>'


def section(title: str, images: dict[str, bytes], names: list[str]) -> list[str]:
    return [f"<h2>{title}</h2>", *(image(name, images[name]) for name in names)]


def image(name: str, png: bytes) -> str:
    width = int.from_bytes(png[16:20], "big") * 96 // DPI  # of the PNG header; shown at its size on paper
    return f'<img alt="{name}" width="{width}" src="data:image/png;base64,{base64.b64encode(png).decode()}">'


def html_table(head: Iterable[str], rows: Iterable[str], kind: str = "") -> str:
    cells = "".join(f"<th>{escape(cell)}</th>" for cell in head)
    return f'<div class="scroll"><table class="{kind}">\n<tr>{cells}</tr>\n' + "\n".join(rows) + "\n</table></div>"


def row(first: str, numbers: Iterable[str], kind: str = "") -> str:
    cells = "".join(f'<td class="number">{escape(number)}</td>' for number in numbers)
    return f'<tr class="{kind}"><td>{escape(first)}</td>{cells}</tr>'


def systems_table(systems: Iterable[System], strong: System, measures: Sequence[str]) -> str:
    """A row for each system, and the one that counts in strong letters."""
    rows = []
    for system in systems:
        values = means(system.per_query)
        cells = (f"{values[name]:.4f}" for name in measures)
        rows.append(row(system.name, cells, "strong" if system is strong else ""))
    return html_table(["ranked by", *measures], rows)


def comparison_section(evaluation: Evaluation) -> list[str]:
    if not evaluation.comparisons:
        return []
    rows = [row(comparison.metric, comparison_cells(comparison)) for comparison in evaluation.comparisons]
    about = f"The baseline is {evaluation.before.name}; {describe_test(evaluation.config.significance)}."
    return ["<h2>Difference to the baseline</h2>", note(about), html_table(("metric", *COMPARISON_HEAD), rows)]


def changes_section(evaluation: Evaluation) -> list[str]:
    lines = []
    for title, kind, changes in zip(("gained", "lost"), ("gain", "loss"), evaluation.changes, strict=True):
        lines.append(f"<h2>Queries that {title} most</h2>" if changes else f"<p>No query {title}.</p>")
        for change in changes:
            lines += change_block(evaluation, change, kind)
    return lines


def change_block(evaluation: Evaluation, change: QueryChange, kind: str) -> list[str]:
    query = escape(evaluation.data.queries[change.query])
    rows = []
    for document in change.documents:
        grade, ranks = document.as_text()
        text = on_one_line(evaluation.data.documents[document.document])
        text = text if len(text) <= LONGEST_TEXT else text[:LONGEST_TEXT] + " ..."
        numbers = "".join(f'<td class="number">{escape(cell)}</td>' for cell in (ranks, grade))
        rows.append(f'<tr>{numbers}<td class="text">{escape(text)}</td></tr>')
    head = f'<h3><span class="{kind}">{change.after - change.before:+.3f}</span> {query}</h3>'
    return [head, html_table(("rank", "grade", "document"), rows, "ranks")]


# ---- the figures -----------------------------------------------------------------------------------------


def draw_figures(evaluation: RerankerEvaluation) -> dict[str, Figure]:
    """Figures by name, in the order of the page; the training curves only where a run is known."""
    config, data = evaluation.config, evaluation.data
    scores, relevant = scored_pairs(evaluation.after.run, data.qrels, config.relevant_from)
    figures = {"gains": gains_figure(evaluation)}
    folder = find_run(config.training_run, config.model)
    if folder is not None:
        figures["training"] = training_figure(read_curves(folder))
    figures["grades"] = grades_figure(data.qrels, data.candidates)
    if evaluation.probabilities is not None:
        figures["scores"] = scores_figure(scores, relevant)
        figures["reliability"] = reliability_figure(scores, relevant, evaluation.probabilities.calibration)
        figures["tokens"] = tokens_figure(evaluation.token_lengths, evaluation.max_len)
    return figures


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


Curve = list[tuple[int, float]]  # (optimizer step, value)


def read_curves(run: Path) -> dict[tuple[str, str], Curve]:
    """By panel and name: loss of training and validation, learning rate, and ranking metrics of validation.

    Lines "train" and "eval" of the run's metrics.jsonl have steps of their own, and the last line of a run that was
    killed may be incomplete.
    """
    curves: dict[tuple[str, str], Curve] = {}
    for line in (run / METRICS_FILE).read_text(encoding="utf-8").splitlines():
        try:
            values = json.loads(line)
        except json.JSONDecodeError:
            break
        for name, value in values.items():
            if (place := panel_of(values["kind"], name)) is not None:
                curves.setdefault(place, []).append((values["step"], value))
    return curves


def panel_of(kind: str, name: str) -> tuple[str, str] | None:
    """Where a value of metrics.jsonl is drawn, and as what; None where it is not."""
    if name == "loss":
        return "loss", "training" if kind == "train" else "validation"
    if kind == "train":
        return ("learning rate", "learning rate") if name == "lr" else None
    try:
        parse_metric(name)
    except ValueError:
        return None
    return "validation", name


def training_figure(curves: dict[tuple[str, str], Curve]) -> Figure:
    """Loss, learning rate and, where there was validation, its metrics over optimizer steps, side by side."""
    panels = [name for name in ("loss", "learning rate", "validation") if name in {panel for panel, _ in curves}]
    figure = Figure(figsize=(3.5 * max(len(panels), 1), 3.2), layout="constrained")
    axes = dict(zip(panels, figure.subplots(1, max(len(panels), 1), squeeze=False)[0], strict=False))
    colors = {panel: cycle(CURVE_COLORS) for panel in panels}
    for (panel, name), curve in curves.items():
        marker = "o" if "validation" in (panel, name) else None
        axes[panel].plot(*zip(*curve, strict=True), label=name, color=next(colors[panel]), marker=marker, markersize=4)
    for name, panel in axes.items():
        finish_axes(panel, name, "step", "")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if name == "learning rate":
            panel.yaxis.set_major_formatter("{x:.1e}")
        else:
            panel.legend(frameon=False)
    return figure


def grades_figure(qrels: Qrels, candidates: Run) -> Figure:
    """How many candidates have each grade, and how many judged documents are no candidates."""
    ranked = Counter(qrels[query].get(document) for query, documents in candidates.items() for document in documents)
    judged = Counter(grade for grades in qrels.values() for grade in grades.values())
    levels = [*([None] if ranked[None] else []), *sorted(judged)]
    names = ["unjudged" if level is None else str(level) for level in levels]
    present = [ranked[level] for level in levels]
    missed = [0 if level is None else judged[level] - ranked[level] for level in levels]
    figure = Figure(figsize=WIDE, layout="constrained")
    axes = figure.subplots()
    axes.barh(names, present, color=BLUE, label="candidates")
    if any(missed):
        axes.barh(names, missed, left=present, color=GREY, alpha=0.5, label="judged, not among the candidates")
    total = [a + b for a, b in zip(present, missed, strict=True)]
    for place, (own, other) in enumerate(zip(present, missed, strict=True)):
        text = f" {own:,}" + (f" + {other:,}" if other else "")
        axes.text(total[place], place, text, va="center", fontsize=9)
    axes.set_xlim(0, max(total) * 1.15)
    axes.legend(frameon=False)
    finish_axes(axes, "grades", "documents", "grade", grid="x")
    return figure


def scores_figure(scores: np.ndarray, relevant: np.ndarray) -> Figure:
    """Histograms of the scores of relevant and of other candidates, each with the area 1."""
    figure = Figure(figsize=WIDE, layout="constrained")
    axes = figure.subplots()
    edges = np.histogram_bin_edges(scores, bins=50)
    for own, name, color in ((~relevant, "other", GREY), (relevant, "relevant", BLUE)):
        if own.any():
            label = f"{name} ({own.sum():,})"
            axes.hist(scores[own], edges, density=True, alpha=0.55, color=color, label=label)
    axes.legend(frameon=False)
    finish_axes(axes, "scores of candidates", "score", "density")
    return figure


def reliability_figure(scores: np.ndarray, relevant: np.ndarray, calibration: Calibration | None) -> Figure:
    """The share of relevant pairs against their mean probability in each tenth; a point's area grows with its pairs."""
    figure = Figure(figsize=SQUARE, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    rows = [("sigmoid of the score", None, ORANGE)]
    if calibration is not None:
        rows.append(("calibrated", calibration, BLUE))
    for name, own, color in rows:
        bins = reliability(probabilities_of(scores, own).values, relevant)
        x, y = [bin.mean_probability for bin in bins], [bin.relevant_share for bin in bins]
        area = [20 + 180 * np.sqrt(bin.pairs / len(scores)) for bin in bins]
        axes.plot(x, y, color=color, linewidth=1.2, label=name)
        axes.scatter(x, y, s=area, color=color, alpha=0.6, linewidths=0)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axes.legend(frameon=False, loc="upper left")
    finish_axes(axes, "reliability", "probability", "share that is relevant")
    return figure


def tokens_figure(lengths: np.ndarray, max_len: int) -> Figure:
    """Histogram of the tokens of pairs before they are truncated, and the limit."""
    figure = Figure(figsize=WIDE, layout="constrained")
    axes = figure.subplots()
    # the longest hundredth would squeeze all others to the left
    most = max(float(np.quantile(lengths, 0.99)), max_len) * 1.05
    axes.hist(np.minimum(lengths, most), bins=50, color=BLUE, alpha=0.7)
    axes.axvline(max_len, color=ORANGE, label=f"limit of {max_len}: {np.mean(lengths > max_len):.1%} are truncated")
    axes.legend(frameon=False)
    finish_axes(axes, "tokens of a pair", "tokens (longer ones at the right end)", "pairs")
    return figure


def gains_figure(evaluation: Evaluation) -> Figure:
    """The difference of every query by the first measure, the largest loss first."""
    metric = evaluation.config.measures[0]
    systems = (evaluation.before, evaluation.after)
    before, after = (np.array(list(system.per_query[metric].values())) for system in systems)
    differences = after - before
    figure = Figure(figsize=WIDE, layout="constrained")
    axes = figure.subplots()
    ordered = np.sort(differences)
    places = np.arange(1, len(ordered) + 1)
    colors = np.where(ordered < 0, ORANGE, BLUE)
    axes.bar(places, ordered, width=1.0 if len(ordered) > 100 else 0.8, color=colors)
    axes.axhline(0, color=GREY, linewidth=0.8)
    mean = float(differences.mean())
    axes.axhline(mean, color=GREEN, linestyle="--", linewidth=1.2, label=f"mean {mean:+.4f}")
    axes.legend(frameon=False, loc="upper left")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    finish_axes(axes, f"{metric}: gain of each query over the baseline", "queries, by gain", "gain")
    return figure


def finish_axes(axes: Axes, title: str, x: str, y: str, grid: str = "y") -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)
