"""An evaluation as files and as text for a terminal.

    per_query.jsonl     a line for each judged query: its figures, those of the baseline, how many are relevant
    result.json         means, comparison, calibration, and the configuration

The trap: run.trec, the third file, is written by the scoring, before anything is measured.
"""

import json
from dataclasses import asdict

from rag_retrieval.core.files import write_text
from rag_retrieval.evaluate.comparison import Comparison
from rag_retrieval.evaluate.evaluation import Evaluation, ProbabilityFigures
from rag_retrieval.evaluate.moves import describe_changes
from rag_retrieval.evaluate.output_folder import RESULT_FILE
from rag_retrieval.evaluate.terminal_text import pad, shorten
from rag_retrieval.metrics import means

LONGEST_NAME = 30  # columns


def write_evaluation(evaluation: Evaluation) -> None:
    """Both files into the evaluation's output_dir, each whole or not at all."""
    rows = [json.dumps(query_row(evaluation, query), ensure_ascii=False) for query in evaluation.data.qrels]
    write_text(evaluation.output_dir / "per_query.jsonl", "".join(row + "\n" for row in rows))
    result = json.dumps(result_of(evaluation), ensure_ascii=False, indent=2)
    write_text(evaluation.output_dir / RESULT_FILE, result + "\n")


def query_row(evaluation: Evaluation, query: str) -> dict:
    row = {
        "query_id": query,
        "query": evaluation.data.queries[query],
        "candidates": len(evaluation.data.candidates[query]),
        "relevant": evaluation.relevant(query),
    }
    if query in evaluation.left_out:
        return row | {"left_out": "no relevant document"}
    return row | {
        **{name: values[query] for name, values in evaluation.after.per_query.items()},
        "baseline": {name: values[query] for name, values in evaluation.before.per_query.items()},
    }


def result_of(evaluation: Evaluation) -> dict:
    """Everything but the queries' own figures, as JSON values."""
    systems = {"model": evaluation.after, "baseline": evaluation.before, "ceiling": evaluation.ceiling}
    return {
        "data": evaluation.data.name,
        "candidates": evaluation.data.source,
        "queries": len(evaluation.measured),
        "queries_without_relevant": len(evaluation.left_out),
        "queries_without_candidates": evaluation.data.queries_without_candidates,
        "judgments_without_document": evaluation.data.judgments_without_document,
        "pairs": evaluation.data.num_pairs,
        **{key: {"name": system.name, **means(system.per_query)} for key, system in systems.items()},
        "significance": evaluation.config.significance,
        "comparison": [asdict(comparison) for comparison in evaluation.comparisons],
        "probabilities": asdict(evaluation.probabilities),
        "config": evaluation.config.model_dump(),
    }


def describe_evaluation(evaluation: Evaluation, columns: int) -> str:
    """What a person wants to know, for a terminal of `columns` columns."""
    data = evaluation.data
    size = f"{len(evaluation.measured):,} queries, {data.num_pairs:,} pairs"
    lines = [f"{data.name}: {size}; candidates from {data.source}", ""]
    lines += table(evaluation)
    if evaluation.comparisons:
        lines += ["", f"difference to {evaluation.before.name} ({describe_test(evaluation)}):", ""]
        lines += [describe_comparison(comparison) for comparison in evaluation.comparisons]
    lines += ["", describe_probabilities(evaluation.probabilities)]
    cut = float((evaluation.token_lengths > evaluation.max_len).mean())
    lines.append(f"{cut:.1%} of the pairs are longer than the model's {evaluation.max_len} tokens and are cut")
    lines += describe_gaps(evaluation)
    lines += ["", describe_changes(data, evaluation.changes, evaluation.config.measures[0], columns)]
    page = "; the page: report.html" if evaluation.config.report else ""
    return "\n".join([*lines, "", f"written to {evaluation.output_dir}{page}"])


def describe_gaps(evaluation: Evaluation) -> list[str]:
    """A line for each thing that the data lack and that lowers the figures, whatever the reranker."""
    data = evaluation.data
    gaps = (
        (len(evaluation.left_out), "judged queries have no relevant document and are left out of all figures"),
        (data.queries_without_candidates, "queries have no candidates and count 0"),
        (data.judgments_without_document, "judgments are of documents that the corpus lacks; they count as missed"),
    )
    return [f"{count:,} {what}" for count, what in gaps if count]


def table(evaluation: Evaluation) -> list[str]:
    names = evaluation.config.measures
    lines = [" " * (LONGEST_NAME + 2) + "".join(f"{name:>11}" for name in names)]
    for system in (evaluation.before, evaluation.after, evaluation.ceiling):
        values = means(system.per_query)
        # of a path the end tells more than the beginning
        name = system.name if len(system.name) <= LONGEST_NAME else "..." + system.name[3 - LONGEST_NAME :]
        row = pad("  " + shorten(name, LONGEST_NAME), LONGEST_NAME + 2)
        lines.append(row + "".join(f"{values[measure]:>11.4f}" for measure in names))
    return lines


def describe_test(evaluation: Evaluation) -> str:
    if evaluation.config.significance == "t":
        return "paired t-test, 95% interval"
    return "paired randomization test, 95% bootstrap interval"


def describe_comparison(comparison: Comparison) -> str:
    interval = f"[{comparison.low:+.4f}, {comparison.high:+.4f}]"
    p_value = "p < 0.001" if comparison.p_value < 0.001 else f"p = {comparison.p_value:.3f}"
    counts = f"{comparison.gained} gained, {comparison.lost} lost, {comparison.same} same"
    return f"  {comparison.measure:<12}{comparison.difference:+.4f}  {interval}  {p_value:<10} {counts}"


def describe_probabilities(figures: ProbabilityFigures) -> str:
    raw = f"log loss {figures.raw_log_loss:.4f}, calibration error {figures.raw_error:.4f}"
    if figures.calibration is None:
        return f"probabilities, not calibrated: {raw}"
    made = figures.calibration
    return (
        f"probabilities, calibrated on {made.data} (temperature {made.temperature:.3f}, bias {made.bias:+.3f}):\n"
        f"  log loss {figures.log_loss:.4f}, calibration error {figures.error:.4f}; without: {raw}"
    )
