"""The figures of a report, one function each; matplotlib is imported here and nowhere else.

What a reader would get wrong: `Figure` is used without pyplot, which keeps every figure in memory and asks for a
display. And no text of the data is drawn: matplotlib's own font has no Chinese.
"""

from collections import Counter

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rag_retrieval.data.beir import Qrels, Run
from rag_retrieval.evaluate.calibration_fit import calibrated, reliability
from rag_retrieval.evaluate.training_curves import Curve, TrainingCurves
from rag_retrieval.models.calibration import Calibration

BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#6b6b6b"  # told apart by the colour-blind
WIDE, SQUARE = (8.0, 3.2), (5.0, 4.6)  # inches


def training_figure(curves: TrainingCurves) -> Figure:
    """Loss, learning rate and, where there was validation, its metrics over optimizer steps, side by side."""
    panels = ["loss", "learning rate", *(["validation"] if curves.metrics else [])]
    figure = Figure(figsize=(3.5 * len(panels), 3.2), layout="constrained")
    axes = dict(zip(panels, figure.subplots(1, len(panels)), strict=True))
    _draw(axes["loss"], curves.train_loss, "training", BLUE)
    _draw(axes["loss"], curves.eval_loss, "validation", ORANGE, marker="o")
    _draw(axes["learning rate"], curves.lr, "learning rate", BLUE)
    for (name, curve), color in zip(curves.metrics.items(), (BLUE, ORANGE, GREEN), strict=False):
        _draw(axes["validation"], curve, name, color, marker="o")
    for name, panel in axes.items():
        _finish(panel, name, "step", "")
        panel.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        if name != "learning rate":
            panel.legend(frameon=False)
    axes["learning rate"].yaxis.set_major_formatter("{x:.1e}")
    return figure


def _draw(axes: Axes, curve: Curve, name: str, color: str, marker: str | None = None) -> None:
    if curve:
        axes.plot(*zip(*curve, strict=True), label=name, color=color, marker=marker, markersize=4)


def grades_figure(qrels: Qrels, candidates: Run) -> Figure:
    """How many candidates have each grade, and how many judged documents are no candidates."""
    ranked = Counter(qrels[query].get(document) for query, documents in candidates.items() for document in documents)
    judged = Counter(grade for grades in qrels.values() for grade in grades.values())
    levels = [*([None] if ranked[None] else []), *sorted(judged)]
    names = ["unjudged" if level is None else str(level) for level in levels]
    found = [ranked[level] for level in levels]
    missed = [0 if level is None else judged[level] - ranked[level] for level in levels]
    figure = Figure(figsize=WIDE, layout="constrained")
    axes = figure.subplots()
    axes.barh(names, found, color=BLUE, label="candidates")
    if any(missed):
        axes.barh(names, missed, left=found, color=GREY, alpha=0.5, label="judged, not among the candidates")
    total = [a + b for a, b in zip(found, missed, strict=True)]
    for place, (own, other) in enumerate(zip(found, missed, strict=True)):
        text = f" {own:,}" + (f" + {other:,}" if other else "")
        axes.text(total[place], place, text, va="center", fontsize=9)
    axes.set_xlim(0, max(total) * 1.15)
    axes.legend(frameon=False)
    _finish(axes, "grades", "documents", "grade", grid="x")
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
    _finish(axes, "scores of candidates", "score", "density")
    return figure


def reliability_figure(scores: np.ndarray, relevant: np.ndarray, calibration: Calibration | None) -> Figure:
    """The share of relevant pairs against their mean probability in each tenth; a point's area tells its pairs."""
    figure = Figure(figsize=SQUARE, layout="constrained")
    axes = figure.subplots()
    axes.plot([0, 1], [0, 1], color=GREY, linestyle="--", linewidth=1)
    rows = [("sigmoid of the score", None, ORANGE)]
    if calibration is not None:
        rows.append(("calibrated", calibration, BLUE))
    for name, own, color in rows:
        bins = reliability(calibrated(scores, own), relevant)
        x, y = [bin.mean_probability for bin in bins], [bin.relevant_share for bin in bins]
        area = [20 + 180 * np.sqrt(bin.pairs / len(scores)) for bin in bins]
        axes.plot(x, y, color=color, linewidth=1.2, label=name)
        axes.scatter(x, y, s=area, color=color, alpha=0.6, linewidths=0)
    axes.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03), aspect="equal")
    axes.legend(frameon=False, loc="upper left")
    _finish(axes, "reliability", "probability", "share that is relevant")
    return figure


def tokens_figure(lengths: np.ndarray, max_len: int) -> Figure:
    """Histogram of the tokens of pairs before they are cut, and the limit."""
    figure = Figure(figsize=WIDE, layout="constrained")
    axes = figure.subplots()
    # the longest hundredth would squeeze all others to the left
    most = max(float(np.quantile(lengths, 0.99)), max_len) * 1.05
    axes.hist(np.minimum(lengths, most), bins=50, color=BLUE, alpha=0.7)
    axes.axvline(max_len, color=ORANGE, label=f"limit of {max_len}: {np.mean(lengths > max_len):.1%} are cut")
    axes.legend(frameon=False)
    _finish(axes, "tokens of a pair", "tokens (longer ones at the right end)", "pairs")
    return figure


def gains_figure(differences: np.ndarray, measure: str) -> Figure:
    """The difference of every query, the largest loss first. differences: [queries]."""
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
    _finish(axes, f"{measure}: gain of each query over the baseline", "queries, by gain", "gain")
    return figure


def _finish(axes: Axes, title: str, x: str, y: str, grid: str = "y") -> None:
    axes.set_title(title, loc="left", fontsize=11)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis=grid, alpha=0.25)
    axes.set_axisbelow(True)
