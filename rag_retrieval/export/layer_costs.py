"""What each layer costs in int8, and which to leave in float32 so that int8 is within its limits."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from rag_retrieval.core.log import Progress
from rag_retrieval.core.terminal import plain_table, rendered, terminal_columns
from rag_retrieval.export.verify import Change, Verification

TABLE_COLUMNS = 200  # at least: names are there to be copied, and none is cut


@dataclass(frozen=True)
class LayerCost:
    """change: of one layer in int8 and all others in float32, beside the model, on all that the export is checked on.
    Of several representations, each measure of the one that suffers most."""

    name: str
    change: Change


def layer_costs(names: Sequence[str], verified: Callable[[Collection[str]], Verification]) -> list[LayerCost]:
    """The costliest first, by rank correlation: that is of all scores, where nDCG@10 moves by whole ranks of a few
    documents, up as well as down. verified: of the export with the named layers in float32; asked once a layer."""
    costs = []
    with Progress(len(names), "measuring layers", "layers") as progress:
        for name in names:
            changes = verified([other for other in names if other != name]).changes
            costs.append(LayerCost(name, worst(list(changes.values()))))
            progress.update(1)
    return sorted(costs, key=lambda cost: costliness(cost.change))


def costliness(change: Change) -> tuple[float, float]:
    """The least is the costliest."""
    return np.nan_to_num(change.rank_correlation, nan=-1.0), -change.max_difference


def worst(changes: Sequence[Change]) -> Change:
    def falls_most(pairs: list[tuple]) -> tuple:
        return pairs[0] if pairs[0][0] is None else max(pairs, key=lambda pair: pair[0] - pair[1])

    return Change(
        max(change.max_difference for change in changes),
        min(change.rank_correlation for change in changes),
        *falls_most([(change.ndcg_before, change.ndcg_after) for change in changes]),
        *falls_most([(change.graded_before, change.graded_after) for change in changes]),
    )


def fewest_to_exclude(names: Sequence[str], within_limits: Callable[[Sequence[str]], bool]) -> list[str]:
    """The first so many names, and no fewer, that have to be excluded. within_limits: of what is excluded; taken to
    stay true where more is excluded, and true for all."""
    if within_limits([]):
        return []
    too_few, enough = 0, 1
    while enough < len(names) and not within_limits(names[:enough]):
        too_few, enough = enough, 2 * enough
    enough = min(enough, len(names))
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        too_few, enough = (too_few, middle) if within_limits(names[:middle]) else (middle, enough)
    return list(names[:enough])


def describe_costs(costs: Sequence[LayerCost], excluded: Collection[str]) -> str:
    measures = [name for name, _, _ in costs[0].change.measures()]
    rows = [
        (
            cost.name,
            f"{cost.change.rank_correlation:.5f}",
            f"{cost.change.max_difference:.1e}",
            *(f"{after:.4f} ({after - before:+.4f})" for _, before, after in cost.change.measures()),
            "float32" * (cost.name in excluded),
        )
        for cost in costs
    ]
    head = ("this layer alone in int8", "rank correlation", "largest difference", *measures, "")
    return rendered([plain_table(head, rows)], max(terminal_columns(), TABLE_COLUMNS))
