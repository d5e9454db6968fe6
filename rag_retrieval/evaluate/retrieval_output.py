"""An evaluation of retrievers as files, as text for a terminal, and as a page.

    per_query.jsonl     a line for each judged query: the figures of every row of the table
    result.json         means, comparisons, places of relevant documents, recall by depth, the configuration
    runs/*.trec         the documents of every row, written when they are found
    report.html         the same with pictures and the stages of queries, where it is asked for
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from html import escape
from typing import TYPE_CHECKING

from rag_retrieval.core.terminal import plain_table, rendered
from rag_retrieval.evaluate.other_commands import as_dict
from rag_retrieval.evaluate.output import (
    COMPARISON_HEAD,
    GAPS_IN_WORDS,
    comparison_cells,
    describe_changes,
    describe_test,
    write_files,
)
from rag_retrieval.evaluate.retrieval import RetrievalEvaluation, first_cutoff
from rag_retrieval.metrics import means

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def write_retrieval(evaluation: RetrievalEvaluation) -> None:
    """The files into the evaluation's output_dir, each whole or not at all."""
    write_files(evaluation.output_dir, query_rows(evaluation), result_of(evaluation))
    if evaluation.config.report:
        write_report(evaluation)


def query_rows(evaluation: RetrievalEvaluation) -> Iterator[dict]:
    for query in evaluation.data.qrels:
        row = {"query_id": query, "query": evaluation.data.queries[query], "relevant": evaluation.relevant(query)}
        if not row["relevant"]:
            yield row | {"left_out": "no relevant document"}
            continue
        yield row | {
            "systems": {
                system.name: {name: values[query] for name, values in system.per_query.items()}
                for system in evaluation.systems
            }
        }


def gaps(evaluation: RetrievalEvaluation) -> dict[str, int]:
    return {
        "queries_without_relevant": len(evaluation.data.qrels) - len(evaluation.measured),
        "queries_with_identical_ids": evaluation.data.identical_ids,
    }


def result_of(evaluation: RetrievalEvaluation) -> dict:
    """Everything but the queries' own figures, as JSON values."""
    recall = evaluation.recall
    return {
        "data": evaluation.data.name,
        "queries": len(evaluation.measured),
        **gaps(evaluation),
        "systems": [
            {
                "name": system.name,
                **means(system.per_query),
                "relevant_documents": asdict(evaluation.places[system.name]),
                "recall_by_depth": [round(value, 6) for value in recall[system.name].tolist()],
            }
            for system in evaluation.systems
        ],
        "ceilings": [{"name": system.name, **means(system.per_query)} for system in evaluation.ceilings],
        "baseline": evaluation.before.name,
        "significance": evaluation.config.significance,
        "comparisons": {name: [asdict(one) for one in rows] for name, rows in evaluation.of_each.items()},
        "config": evaluation.config.model_dump(mode="json"),
    }


# ---- text and page


@dataclass(frozen=True)
class Table:
    """rows: the name of the system, and a text for each of `head`."""

    title: str
    head: Sequence[str]
    rows: list[tuple[str, ...]]


def tables(evaluation: RetrievalEvaluation) -> list[Table]:
    """Figures; differences by the first measure, where there are some (result.json has those by all); places."""
    config, before = evaluation.config, evaluation.before.name
    systems = [*evaluation.systems, *evaluation.ceilings]
    figures = [(system.name, *(f"{mean:.4f}" for mean in means(system.per_query).values())) for system in systems]
    compared = [(name, *comparison_cells(rows[0])) for name, rows in evaluation.of_each.items() if rows]
    tested = f"difference to {before} in {config.measures[0]} ({describe_test(config.significance)})"
    places = [(name, *(f"{count:,}" for count in asdict(own).values())) for name, own in evaluation.places.items()]
    head = (f"first {first_cutoff(config)}", f"below, to {config.depth}", "not found", "not in the corpus")
    return [
        Table("means over the queries", config.measures, figures),
        *([Table(tested, COMPARISON_HEAD, compared)] if compared else []),
        Table("where the relevant documents of all queries are", head, places),
    ]


def facts(evaluation: RetrievalEvaluation) -> str:
    config, data = evaluation.config, evaluation.data
    found = f"{data.name}: {len(evaluation.measured):,} queries, the best {config.depth} documents of each"
    return f"{found}; a document of grade {config.relevant_from} or more is relevant"


def describe_retrieval(evaluation: RetrievalEvaluation, columns: int) -> str:
    """What a person wants to know, for a terminal of `columns` columns; or, with `output_format` dict, a dict of means,
    by the row's name where there are several rows."""
    if evaluation.config.output_format == "dict":
        dicts = {system.name: as_dict(means(system.per_query)) for system in evaluation.systems}
        return str(dicts if len(dicts) > 1 else dicts[evaluation.after.name])
    left_out = (f"{count:,} {GAPS_IN_WORDS[name]}" for name, count in gaps(evaluation).items() if count)
    parts = [facts(evaluation), *left_out]
    for table in tables(evaluation):
        rows = [(f"  {name}", *cells) for name, *cells in table.rows]
        parts += [f"\n{table.title}:\n", plain_table(("", *table.head), rows)]
    return rendered([*parts, f"\n{changed(evaluation)}:", *describe_changes(evaluation)], columns)


def changed(evaluation: RetrievalEvaluation) -> str:
    return f"{evaluation.after.name} beside {evaluation.before.name}"


def write_report(evaluation: RetrievalEvaluation) -> None:
    """report.html and figures/ in the evaluation's output_dir."""
    from rag_retrieval.evaluate import query_view, report

    figures = {"recall": recall_figure(evaluation)}
    if evaluation.before is not evaluation.after:
        figures["gains"] = report.gains_figure(evaluation)
    images = report.save_figures(evaluation.output_dir, figures)
    body = [report.note(facts(evaluation))]
    for table in tables(evaluation):
        rows = [report.row(name, cells) for name, *cells in table.rows]
        body += [f"<h2>{escape(table.title)}</h2>", report.html_table(("ranked by", *table.head), rows)]
    body += report.section("recall by depth", images, ["recall"])
    if "gains" in images:
        body += report.section(escape(changed(evaluation)), images, ["gains"]) + report.changes_section(evaluation)
    title = f"Retrieval on {evaluation.data.name}"
    report.write_page(evaluation.output_dir, title, body, query_view.section(evaluation), query_view.SCRIPT)


def recall_figure(evaluation: RetrievalEvaluation) -> "Figure":
    """The mean share of the relevant documents among the first 1, 2, ... of every row."""
    from matplotlib.figure import Figure

    from rag_retrieval.evaluate.report import CURVE_COLORS, WIDE, finish_axes

    figure = Figure(figsize=(WIDE[0], 4.2), layout="constrained")
    axes = figure.subplots()
    for place, (name, recall) in enumerate(evaluation.recall.items()):
        color, style = CURVE_COLORS[place % len(CURVE_COLORS)], "--" if name.endswith(" reranked") else "-"
        label = name if name.isascii() else f"row {place + 1}"  # matplotlib's font has no Chinese
        axes.plot(range(1, len(recall) + 1), recall, style, color=color, label=label, linewidth=1.6)
    axes.set_xscale("log")
    ticks = [tick for tick in (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000) if tick <= len(recall)]
    axes.set_xticks(ticks, map(str, ticks))
    axes.minorticks_off()
    axes.set_ylim(0, 1.02)
    axes.legend(frameon=False, loc="lower right", fontsize=8)
    finish_axes(axes, "recall by depth", "documents (log scale)", "share of the relevant ones found")
    return figure
