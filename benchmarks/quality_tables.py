"""The rows of `quality.py` as text: one row in the terminal, many as Markdown tables, their differences tested.

A test over queries says what other queries would show of these very models. Another seed is another model, which is
why several seeds have their range beside the mean.
"""

import json
from pathlib import Path

from rag_retrieval import losses
from rag_retrieval.evaluate.output import comparison_cells
from rag_retrieval.significance import compare

TRAINERS = ("ours", "sentence-transformers")
LOSSES = list(losses.LOSSES)
COLUMNS = ("ndcg@10", "mrr@10", "map")
TESTED = "ndcg@10"

Row = dict
Seeds = dict[int, Row]  # by seed
Table = dict[tuple[str, str, str], Seeds]  # by loss, records and trainer


def describe_row(row: Row) -> str:
    lines = [f"{'':<42}" + "".join(f"{name:>9}" for name in COLUMNS)]
    for name, values in row["figures"].items():
        label = f"{row['loss']} by {row['trainer']}" if name == "trained" else name
        lines.append(f"{label:<42}" + "".join(f"{values[column]:>9.4f}" for column in COLUMNS))
    for name in ("training", "scoring"):
        lines.append(f"{name}: {row[name]['seconds']:.1f} s, {row[name]['cpu_seconds']:.1f} CPU s")
    return "\n".join([*lines, describe_versions(row)])


def describe_versions(row: Row) -> str:
    libraries = ", ".join(f"{name} {number}" for name, number in row["versions"].items())
    return f"{row['threads']} threads on {row['cores']} cores; {libraries}"


def read_rows(path: Path) -> list[Row]:
    with path.open(encoding="utf-8") as file:
        return [json.loads(line) for line in file if line.strip()]


def append_row(path: Path, row: Row) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def markdown_tables(rows: list[Row], baseline: str | None = None) -> str:
    """A table for each setting. Rows that differ in the seed alone become one; of a seed twice, the later.

    baseline: "loss/records/trainer" of a row, with which all others are compared; None: ours with
    sentence-transformers' for the same loss and records. Raises ValueError for a baseline that no table has.
    """
    tables: dict[str, Table] = {}
    for row in rows:
        table = tables.setdefault(json.dumps(row["setting"]), {})
        table.setdefault((row["loss"], row["records"], row["trainer"]), {})[row["seed"]] = row
    if baseline is not None and not any(baseline == "/".join(key) for table in tables.values() for key in table):
        known = sorted({"/".join(key) for table in tables.values() for key in table})
        raise ValueError(f"--baseline: no row is {baseline}; there are {', '.join(known)}")
    return "\n\n".join(markdown_table(json.loads(key), table, baseline) for key, table in tables.items())


def markdown_table(common: dict, table: Table, baseline: str | None) -> str:
    rows = [row for seeds in table.values() for row in seeds.values()]
    names = [*COLUMNS, "training, s (CPU s)", "scoring, s (CPU s)"]
    lines = [", ".join(f"{name} {value}" for name, value in common.items()), ""]
    lines += [f"| loss | records | ranked by | seeds | {' | '.join(names)} |", "|---|---|---|---" * 2 + "|---|"]
    untrained = {name: figures for row in rows for name, figures in row["figures"].items() if name != "trained"}
    for name, figures in untrained.items():
        lines.append(f"| | | {name} | | {' | '.join(f'{figures[column]:.4f}' for column in COLUMNS)} | | |")
    lines += [markdown_row(key, list(table[key].values())) for key in sorted(table, key=place_of)]
    lines += ["", *differences(table, baseline)]
    return "\n".join([*lines, *dict.fromkeys(describe_versions(row) for row in rows)])


def place_of(key: tuple[str, str, str]) -> tuple:
    """Where a row stands: losses in their order, what they were given in that of the alphabet, ours first."""
    loss, records, trainer = key
    name, _, more = loss.partition(" ")
    return LOSSES.index(name), more, records, TRAINERS.index(trainer)


def markdown_row(key: tuple[str, str, str], rows: list[Row]) -> str:
    figures = [decimals([row["figures"]["trained"][name] for row in rows]) for name in COLUMNS]
    times = [seconds([row[name] for row in rows]) for name in ("training", "scoring")]
    return f"| {' | '.join(key)} | {len(rows)} | {' | '.join([*figures, *times])} |"


def differences(table: Table, baseline: str | None) -> list[str]:
    """A line for each row that has a counterpart: its difference per query, averaged over the seeds that both have."""
    lines = []
    for key in sorted(table, key=place_of):
        loss, records, _ = key
        other = (loss, records, TRAINERS[1]) if baseline is None else tuple(baseline.split("/"))
        seeds = sorted(table[key].keys() & table.get(other, {}).keys())
        if key != other and seeds:
            before, after = (per_query([table[name][seed] for seed in seeds]) for name in (other, key))
            lines.append(difference("/".join(key), "/".join(other), before, after, len(seeds)))
    return [*lines, ""] if lines else []


def per_query(rows: list[Row]) -> dict[str, float]:
    """TESTED of each query, averaged over the rows."""
    return {query: mean([row["per_query"][query] for row in rows]) for query in rows[0]["per_query"]}


def difference(name: str, other: str, before: dict[str, float], after: dict[str, float], seeds: int) -> str:
    (comparison,) = compare({TESTED: before}, {TESTED: after}, "randomization", seed=0)
    gain, interval, p_value, *counts = comparison_cells(comparison)
    averaged = f" ({seeds} seeds)" if seeds > 1 else ""
    return f"{name} - {other}: {TESTED} {gain}, {interval}, p {p_value}, {'/'.join(counts)} gained/lost/same{averaged}"


def decimals(values: list[float]) -> str:
    """The mean, with the range behind it where there are several values."""
    if len(values) == 1:
        return f"{values[0]:.4f}"
    return f"{mean(values):.4f} ({min(values):.4f} to {max(values):.4f})"


def seconds(times: list[dict[str, float]]) -> str:
    wall, cpu = (mean([time[name] for time in times]) for name in ("seconds", "cpu_seconds"))
    return f"{wall:.0f} ({cpu:.0f})"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)
