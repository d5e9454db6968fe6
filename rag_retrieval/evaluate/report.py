"""The report of an evaluation: one HTML page that needs nothing beside it, and its figures as PNG files.

    report.html         figures inside, no script, nothing loaded from elsewhere
    figures/*.png       the same figures

The trap: texts of queries and documents are data and may hold markup; every text goes through `escape`.
"""

import base64
import io
from collections.abc import Iterable
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from rag_retrieval.core.files import write_text
from rag_retrieval.evaluate.calibration_fit import scored_pairs
from rag_retrieval.evaluate.evaluation import Evaluation, System
from rag_retrieval.evaluate.evaluation_output import describe_probabilities, describe_test
from rag_retrieval.evaluate.moves import QueryChange
from rag_retrieval.evaluate.terminal_text import shorten
from rag_retrieval.evaluate.training_curves import find_run, read_curves
from rag_retrieval.metrics import means

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DPI = 150
LONGEST_TEXT = 190  # columns of a document's text

STYLE = """
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; color: #222; background: #fff;
       font: 16px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "Microsoft YaHei", "PingFang SC", sans-serif; }
h1 { font-size: 1.6rem; margin-bottom: .2rem; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin-top: 2.2rem; border-bottom: 1px solid #ddd; padding-bottom: .2rem; }
h3 { font-size: 1rem; margin: 1.4rem 0 .3rem; overflow-wrap: anywhere; }
.note { color: #555; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .93rem; }
th, td { padding: .25rem .7rem; text-align: right; border-bottom: 1px solid #eee; vertical-align: top; }
th:first-child, td:first-child, td.text, .moves th:last-child { text-align: left; overflow-wrap: anywhere; }
td:first-child:not(.number) { min-width: 8rem; } td.text { min-width: 14rem; }
td.number { white-space: nowrap; }
tr.strong td { font-weight: 600; }
img { max-width: 100%; height: auto; display: block; margin: .6rem 0; }
.gain { color: #0072b2; } .loss { color: #b34700; }
"""


def write_report(evaluation: Evaluation) -> Path:
    """report.html and figures/ in the evaluation's output_dir; the path of the page.

    Raises ValueError where the configuration names a training run that is none, ImportError without matplotlib.
    """
    figures = draw_figures(evaluation)
    folder = evaluation.output_dir / "figures"
    folder.mkdir(exist_ok=True)
    images = {}
    for name, figure in figures.items():
        images[name] = png_of(figure)
        (folder / f"{name}.png").write_bytes(images[name])
    page = evaluation.output_dir / "report.html"
    write_text(page, page_of(evaluation, images))
    return page


def draw_figures(evaluation: Evaluation) -> dict[str, "Figure"]:
    """Figures by name, in the order of the page; the training curves only where a run is known."""
    from rag_retrieval.evaluate import report_figures as draw

    config, data, run = evaluation.config, evaluation.data, evaluation.after.run
    scores, relevant = scored_pairs(run, data.qrels, config.relevant_from)
    first = config.measures[0]
    before, after = (np.array(list(s.per_query[first].values())) for s in (evaluation.before, evaluation.after))
    figures = {"gains": draw.gains_figure(after - before, first)}
    folder = find_run(config.training_run, config.model)
    if folder is not None:
        figures["training"] = draw.training_figure(read_curves(folder))
    figures["scores"] = draw.scores_figure(scores, relevant)
    figures["reliability"] = draw.reliability_figure(scores, relevant, evaluation.probabilities.calibration)
    figures["grades"] = draw.grades_figure(data.qrels, data.candidates)
    figures["tokens"] = draw.tokens_figure(evaluation.token_lengths, evaluation.max_len)
    return figures


def png_of(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()


# ---- the page -------------------------------------------------------------------------------------------


def page_of(evaluation: Evaluation, images: dict[str, bytes]) -> str:
    data, config = evaluation.data, evaluation.config
    title = f"{evaluation.after.name} on {data.name}"
    facts = (
        f"{len(evaluation.measured):,} queries, {data.num_pairs:,} pairs; candidates from {data.source}, at most "
        f"{config.depth} for a query; a document of grade {config.relevant_from} or more is relevant"
    )
    body = [f"<h1>{escape(title)}</h1>", f'<p class="note">{escape(facts)}</p>']
    body += ["<h2>Figures</h2>", systems_table(evaluation)]
    body += comparison_section(evaluation)
    body += section("Gain of each query", images, ["gains"])
    body += changes_section(evaluation)
    if "training" in images:
        body += section("Training", images, ["training"])
    body += section("Scores and probabilities", images, ["scores", "reliability"])
    body.append(f'<p class="note">{escape(describe_probabilities(evaluation.probabilities))}</p>')
    body += section("Data", images, ["grades", "tokens"])
    return (
        f'<!doctype html>\n<html>\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + "\n</body>\n</html>\n"
    )


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


def systems_table(evaluation: Evaluation) -> str:
    names = evaluation.config.measures

    def of(system: System, kind: str = "") -> str:
        values = means(system.per_query)
        return row(system.name, (f"{values[name]:.4f}" for name in names), kind)

    rows = [of(evaluation.before), of(evaluation.after, "strong"), of(evaluation.ceiling)]
    return html_table(["ranked by", *names], rows)


def comparison_section(evaluation: Evaluation) -> list[str]:
    if not evaluation.comparisons:
        return []
    rows = [
        row(
            found.measure,
            (
                f"{found.difference:+.4f}",
                f"{found.low:+.4f} to {found.high:+.4f}",
                "< 0.001" if found.p_value < 0.001 else f"{found.p_value:.3f}",
                *(f"{count:,}" for count in (found.gained, found.lost, found.same)),
            ),
        )
        for found in evaluation.comparisons
    ]
    note = f"The baseline is {evaluation.before.name}; {describe_test(evaluation)}."
    head = ("measure", "difference", "95% interval", "p", "gained", "lost", "same")
    return ["<h2>Difference to the baseline</h2>", f'<p class="note">{escape(note)}</p>', html_table(head, rows)]


def changes_section(evaluation: Evaluation) -> list[str]:
    lines = []
    for title, kind, changes in zip(("gained", "lost"), ("gain", "loss"), evaluation.changes, strict=True):
        lines.append(f"<h2>Queries that {title} most</h2>" if changes else f"<p>No query {title}.</p>")
        for change in changes:
            lines += change_block(evaluation, change, kind)
    return lines


def change_block(evaluation: Evaluation, change: QueryChange, kind: str) -> list[str]:
    documents, difference = evaluation.data.documents, change.after - change.before
    query = escape(evaluation.data.queries[change.query])
    rows = []
    for move in change.moves:
        before, after, grade = ("-" if value is None else str(value) for value in (move.before, move.after, move.grade))
        numbers = "".join(f'<td class="number">{cell}</td>' for cell in (f"{before} → {after}", grade))
        rows.append(
            f'<tr>{numbers}<td class="text">{escape(shorten(documents[move.document], LONGEST_TEXT))}</td></tr>'
        )
    head = f'<h3><span class="{kind}">{difference:+.3f}</span> {query}</h3>'
    return [head, html_table(("rank", "grade", "document"), rows, "moves")]
