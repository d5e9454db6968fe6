"""One objective for several representations of a text: a loss for each, one for their ensemble, and self-distillation.

Chen et al., "BGE M3-Embedding" (2024), section 3, with the weights of FlagEmbedding's trainer as defaults.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace

from rag_retrieval.losses.embedding import Flops, Objective, SelfDistillation

LOSS_WEIGHTS = {"dense": 1.0, "lexical": 0.1, "multi_vector": 1.0, "ensemble": 1.0}
ENSEMBLE_WEIGHTS = {"dense": 1.0, "lexical": 0.3, "multi_vector": 1.0}
DISTILLATION_WEIGHTS = {"dense": 1.0, "lexical": 0.1, "multi_vector": 1.0}


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
    likewise, else `DISTILLATION_WEIGHTS`. Raises ValueError for losses that learn a teacher's vectors with other
    representations than dense ones, and for self-distillation or flops without what they need.
    """
    chosen = [*representations, *(["ensemble"] if len(representations) > 1 else [])]
    weights = {name: {**LOSS_WEIGHTS, **(loss_weights or {})}[name] for name in chosen}
    if len(chosen) == 1:
        weights = {chosen[0]: 1.0}
    if "teacher_vectors" in objective.reads and list(representations) != ["dense"]:
        raise ValueError(
            f"a loss on a teacher's vectors is for dense vectors alone, found {', '.join(representations)}"
        )
    if self_distillation is not None:
        if len(representations) < 2:
            raise ValueError("self-distillation needs two representations or more, whose ensemble teaches each")
        shares = {**DISTILLATION_WEIGHTS, **self_distillation.weights}
        self_distillation = replace(
            self_distillation, weights=_divided({name: shares[name] for name in representations})
        )
    if flops is not None and "lexical" not in representations:
        raise ValueError("FLOPS regularization is of lexical weights, which are not trained here")
    ensemble = {**ENSEMBLE_WEIGHTS, **(ensemble_weights or {})}
    return replace(
        objective,
        loss_weights=_divided(weights),
        ensemble_weights={name: ensemble[name] for name in representations},
        self_distillation=self_distillation,
        flops=flops,
        multi_vector_mean=multi_vector_mean,
    )


def _divided(weights: Mapping[str, float]) -> dict[str, float]:
    number = max(sum(weight != 0 for weight in weights.values()), 1)
    return {name: weight / number for name, weight in weights.items()}
