"""What a model gave for the texts of a step, and gradients of the same form: plain tensors, without a graph."""

from dataclasses import dataclass
from typing import NamedTuple

from torch import Tensor

DENSE, LEXICAL, MULTI_VECTOR, ENSEMBLE = "dense", "lexical", "multi_vector", "ensemble"
REPRESENTATIONS = (DENSE, LEXICAL, MULTI_VECTOR)


@dataclass(frozen=True)
class StepOutputs:
    """Of distinct texts, of all processes together, detached; None for a representation that is not trained.

    dense: float32 [texts, dim], not normalized. lexical: ids int64 [entries], weights float32 [entries] >= 0, and
    counts int64 [texts] of the entries of each text, text after text and within a text by ascending id, each id once.
    multi_vector: vectors float32 [tokens, width], of length 1 or 0, text after text, and counts int64 [texts].
    """

    dense: Tensor | None = None
    lexical: tuple[Tensor, Tensor, Tensor] | None = None
    multi_vector: tuple[Tensor, Tensor] | None = None


class OutputGradients(NamedTuple):
    """At the tensors of a `StepOutputs`, float32: dense [texts, dim], lexical [entries], multi_vector [tokens, width].
    None where there was nothing."""

    dense: Tensor | None = None
    lexical: Tensor | None = None
    multi_vector: Tensor | None = None
