"""An evaluation as files and as text for a terminal.

    per_query.jsonl     a line for each judged query: its figures, those of the baseline, how many are relevant
    result.json         means, comparison, what turns scores into probabilities, what was left out, the configuration

run.trec, the third file, is written by the scoring, before anything is measured.
"""

import json
from collections.abc import Iterable
from dataclasses import asdict
from pathlib import Path

from rich.console import RenderableType
from rich.text import Text

from rag_retrieval.core.files import write_text
from rag_retrieval.core.terminal import on_one_line, plain_table, rendered
from rag_retrieval.evaluate.calibration import ProbabilityErrors
from rag_retrieval.evaluate.evaluation import RerankerEvaluation
from rag_retrieval.evaluate.scoring import RESULT_FILE
from rag_retrieval.evaluate.systems import Evaluation, QueryChange
from rag_retrieval.metrics import means
from rag_retrieval.significance import Comparison


def write_evaluation(evaluation: RerankerEvaluation) -> None:
    """Both files into the evaluation's output_dir, each whole or not at all."""
    rows = [query_row(evaluation, query) for query in evaluation.data.qrels]
    write_files(evaluation.output_dir, rows, result_of(evaluation))


def write_files(output_dir: Path, queries: Iterable[dict], result: dict) -> None:
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in queries]
    write_text(output_dir / "per_query.jsonl", "".join(lines))
    write_text(output_dir / RESULT_FILE, json.dumps(result, ensure_ascii=False, allow_nan=False, indent=2) + "\n")


def query_row(evaluation: RerankerEvaluation, query: str) -> dict:
    row = {
        "query_id": query,
        "query": evaluation.data.queries[query],
        "candidates": len(evaluation.data.candidates[query]),
        "relevant": evaluation.relevant(query),
    }
    if not row["relevant"]:
        return row | {"left_out": "no relevant document"}
    figures, baseline = (
        {name: values[query] for name, values in system.per_query.items()}
        for system in (evaluation.after, evaluation.before)
    )
    return {**row, **figures, "baseline": baseline}


def result_of(evaluation: RerankerEvaluation) -> dict:
    """Everything but the queries' own figures, as JSON values."""
    systems = {"model": evaluation.after, "baseline": evaluation.before, "ceiling": evaluation.ceiling}
    return {
        "data": evaluation.data.name,
        "candidates": evaluation.data.source,
        "words": evaluation.data.words,
        "queries": len(evaluation.measured),
        "pairs": evaluation.data.num_pairs,
        **gaps(evaluation),
        **{key: {"name": system.name, **means(system.per_query)} for key, system in systems.items()},
        "significance": evaluation.config.significance,
        "comparison": [asdict(comparison) for comparison in evaluation.comparisons],
        "probabilities": evaluation.probabilities and asdict(evaluation.probabilities),
        "config": evaluation.config.model_dump(mode="json"),
    }


def gaps(evaluation: Evaluation) -> dict[str, int]:
    """What the data lack, and what is left out. Of queries without a relevant document nothing else is counted."""
    data, measured = evaluation.data, evaluation.measured
    return {
        "queries_without_relevant": len(data.qrels) - len(measured),
        "queries_without_candidates": sum(not data.candidates[query] for query in measured),
        "judgments_without_document": sum(
            document not in data.documents for query in measured for document in data.qrels[query]
        ),
        "queries_with_identical_ids": data.identical_ids,
    }


GAPS_IN_WORDS = {
    "queries_without_relevant": "queries have no relevant document and are left out of all figures",
    "queries_without_candidates": "queries have no candidates and count 0",
    "judgments_without_document": "judgments are of documents that the corpus lacks; they count as missed",
    "queries_with_identical_ids": "queries have a document with their own id, which is left out of their candidates",
}


def describe_evaluation(evaluation: RerankerEvaluation, columns: int) -> str:
    """What a person wants to know, for a terminal of `columns` columns."""
    data = evaluation.data
    lines = [
        f"{data.name}: {len(evaluation.measured):,} queries, {data.num_pairs:,} pairs; candidates from {data.source}",
        *([f"words that BM25 counted: {data.words}"] if data.words else []),
        *(f"{count:,} {GAPS_IN_WORDS[name]}" for name, count in gaps(evaluation).items() if count),
        "",
        f"  baseline  {evaluation.before.name}",
        f"  model     {evaluation.after.name}",
        "  perfect   the candidates in the best order there is",
        "",
    ]
    systems = [means(system.per_query) for system in (evaluation.before, evaluation.after, evaluation.ceiling)]
    rows = [(f"  {name}", *(f"{values[name]:.4f}" for values in systems)) for name in evaluation.config.measures]
    tables: list[RenderableType] = [plain_table(("", "baseline", "model", "perfect"), rows)]
    if evaluation.comparisons:
        tables.append(f"\ndifference to the baseline ({describe_test(evaluation.config.significance)}):\n")
        rows = [(f"  {one.metric}", *comparison_cells(one)) for one in evaluation.comparisons]
        tables.append(plain_table(("", *COMPARISON_HEAD), rows))
    more = [""]
    if evaluation.probabilities is not None:
        too_long = float((evaluation.token_lengths > evaluation.max_len).mean())
        more += [
            describe_probabilities(evaluation.probabilities),
            f"{too_long:.1%} of the pairs are longer than {evaluation.max_len} tokens (long_document: "
            f"{evaluation.config.long_document})",
        ]
    return rendered([*lines, *tables, *more, *describe_changes(evaluation)], columns)


def describe_changes(evaluation: Evaluation) -> list[RenderableType]:
    """The queries that gained and lost most, and where everything is written."""
    lines: list[RenderableType] = []
    for title, changes in zip(("gained", "lost"), evaluation.changes, strict=True):
        metric = evaluation.config.measures[0]
        lines.append(f"\nqueries that {title} most ({metric}):" if changes else f"\nno query {title}")
        lines += [line for change in changes for line in change_lines(evaluation, change)]
    page = "; the page: report.html" if evaluation.config.report else ""
    return [*lines, f"\nwritten to {evaluation.output_dir}{page}"]


COMPARISON_HEAD = ("difference", "95% interval", "p", "gained", "lost", "same")


def comparison_cells(comparison: Comparison) -> tuple[str, ...]:
    """A cell for each of `COMPARISON_HEAD`."""
    p_value = "< 0.001" if comparison.p_value < 0.001 else f"{comparison.p_value:.3f}"
    interval = f"{comparison.low:+.4f} to {comparison.high:+.4f}"
    counts = (f"{count:,}" for count in (comparison.gained, comparison.lost, comparison.same))
    return f"{comparison.difference:+.4f}", interval, p_value, *counts


def describe_test(significance: str) -> str:
    if significance == "t":
        return "paired t-test, 95% interval"
    return "paired randomization test, 95% bootstrap interval"


def describe_probabilities(errors: ProbabilityErrors) -> str:
    plain = f"log loss {errors.sigmoid_log_loss:.4f}, calibration error {errors.sigmoid_calibration_error:.4f}"
    made = errors.calibration
    if made is None:
        return f"probabilities (sigmoid, not calibrated): {plain}"
    return (
        f"probabilities (calibrated on {made.data}: temperature {made.temperature:.3f}, bias {made.bias:+.3f}):\n"
        f"  log loss {errors.log_loss:.4f}, calibration error {errors.calibration_error:.4f}; by the sigmoid: {plain}"
    )


def change_lines(evaluation: Evaluation, change: QueryChange) -> list[Text]:
    """The query, and its documents that changed rank, each on one line."""
    data = evaluation.data
    lines = [f"  {change.after - change.before:+.3f}  {on_one_line(data.queries[change.query])}"]
    for document in change.documents:
        grade, ranks = document.as_text()
        lines.append(f"    grade {grade:<3} rank {ranks:<12} {on_one_line(data.documents[document.document])}")
    return [Text(line) for line in lines]

