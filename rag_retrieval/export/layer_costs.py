"""What each layer costs in int8, and which to leave in float32 so that int8 is within its limits."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import numpy as np

from rag_retrieval.core.log import Progress
from rag_retrieval.core.terminal import plain_table, rendered, terminal_columns
from rag_retrieval.export.source import Compute
from rag_retrieval.export.verify import CheckData, Computed, rank_correlation

COST_PAIRS = 64  # that each layer is measured on


@dataclass(frozen=True)
class LayerCost:
    """Of one layer in int8 and all others in float32, beside the model: Spearman's rank correlation of the scores of
    pairs, and their largest difference. Of several representations, those of the one that suffers most."""

    name: str
    rank_correlation: float
    max_difference: float


def layer_costs(
    names: Sequence[str], open_with: Callable[[Collection[str]], Compute], check: CheckData, expected: Computed
) -> list[LayerCost]:
    """The costliest first. open_with: the export with all but the named layers in int8. expected: of the model."""
    places, texts = check.some_pairs(COST_PAIRS)
    costs = []
    with Progress(len(names), "measuring layers", "layers") as progress:
        for name in names:
            found = check.source.scores(open_with([other for other in names if other != name])(texts))
            sides = [(scores[places], found[kind]) for kind, scores in expected.scores.items()]
            difference = max(float(np.abs(one - other).max()) for one, other in sides)
            costs.append(LayerCost(name, min(rank_correlation(*side) for side in sides), difference))
            progress.update(1)
    return sorted(costs, key=lambda cost: (np.nan_to_num(cost.rank_correlation, nan=-1.0), -cost.max_difference))


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
    rows = [
        (cost.name, f"{cost.rank_correlation:.5f}", f"{cost.max_difference:.1e}", "float32" * (cost.name in excluded))
        for cost in costs
    ]
    head = ("this layer alone in int8", "rank correlation", "largest difference", "")
    return rendered([plain_table(head, rows)], terminal_columns())
