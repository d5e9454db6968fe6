"""One objective for several representations of a text: a loss for each, one for their ensemble, and self-distillation.

Chen et al., "BGE M3-Embedding" (2024), section 3.3, with the weights of FlagEmbedding's trainer as defaults.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rag_retrieval.losses.embedding import (
    DENSE,
    ENSEMBLE,
    LEXICAL,
    MULTI_VECTOR,
    Flops,
    Objective,
    SelfDistillation,
)

LOSS_WEIGHTS = {DENSE: 1.0, LEXICAL: 0.1, MULTI_VECTOR: 1.0, ENSEMBLE: 1.0}
ENSEMBLE_WEIGHTS = {DENSE: 1.0, LEXICAL: 0.3, MULTI_VECTOR: 1.0}  # of scores, in use too
DISTILLATION_WEIGHTS = {DENSE: 1.0, LEXICAL: 0.1, MULTI_VECTOR: 1.0}


def unified(
    objective: Objective,
    representations: Sequence[str],
    loss_weights: Mapping[str, float] | None = None,
    ensemble_weights: Mapping[str, float] | None = None,
    self_distillation: SelfDistillation | None = None,
    flops: Flops | None = None,
    multi_vector_mean: bool = False,
) -> Objective:
    """The objective for these representations, whose terms are taken of the scores of each and of their ensemble.

    One representation alone has its loss as it is, and no ensemble. Of several, the loss is the sum of the weighted
    losses divided by their number; a loss of weight 0 does not count.

    representations: of dense, lexical, multi_vector. loss_weights: by these and "ensemble"; what is not given has the
    weight of `LOSS_WEIGHTS`. ensemble_weights: of scores; else `ENSEMBLE_WEIGHTS`. self_distillation: its weights
    likewise, else `DISTILLATION_WEIGHTS`. Raises ValueError for a weight of what is not among these, for losses that
    learn a teacher's vectors with other representations than dense ones, and for self-distillation or flops without
    what they need.
    """
    several = len(representations) > 1
    chosen = [*representations, ENSEMBLE] if several else list(representations)
    weights = _chosen("representation_weights", LOSS_WEIGHTS if several else {chosen[0]: 1.0}, loss_weights, chosen)
    if not any(weights.values()):
        raise ValueError("representation_weights: all are 0; give one of them a weight above 0")
    if "teacher_vectors" in objective.reads and list(representations) != [DENSE]:
        raise ValueError(
            f"a loss on a teacher's vectors is for dense vectors alone, found {', '.join(representations)}"
        )
    if self_distillation is not None:
        if len(representations) < 2:
            raise ValueError("self-distillation needs two representations or more, whose ensemble teaches each")
        given = self_distillation.weights
        shares = _chosen("self_distill_weights", DISTILLATION_WEIGHTS, given, representations)
        self_distillation = replace(self_distillation, weights=_divided(shares))
    if flops is not None and LEXICAL not in representations:
        raise ValueError("FLOPS regularization is of lexical weights, which are not trained here")
    return replace(
        objective,
        loss_weights=_divided(weights),
        ensemble_weights=_chosen("ensemble_weights", ENSEMBLE_WEIGHTS, ensemble_weights, representations),
        self_distillation=self_distillation,
        flops=flops,
        multi_vector_mean=multi_vector_mean,
    )


def _chosen(
    name: str, defaults: Mapping[str, float], given: Mapping[str, float] | None, chosen: Sequence[str]
) -> dict[str, float]:
    """The weights of those that are chosen, in their order."""
    for unknown in set(given or {}) - set(chosen):
        raise ValueError(f"{name}: found a weight of {unknown}; expected weights of {', '.join(chosen)}")
    return {key: (given or {}).get(key, defaults[key]) for key in chosen}


def _divided(weights: Mapping[str, float]) -> dict[str, float]:
    number = max(sum(weight != 0 for weight in weights.values()), 1)
    return {name: weight / number for name, weight in weights.items()}
