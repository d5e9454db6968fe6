"""What a model gave for the texts of a step, and gradients of the same form: plain tensors, without a graph."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


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


class Ragged:
    """counts: int64 [texts], entries of each text. starts: likewise, place of its first. all: its places, 0 to texts -
    1. texts: int64 [entries], the text of each entry."""

    def __init__(self, counts: Tensor):
        self.counts, self.starts = counts, counts.cumsum(0) - counts
        self.all = torch.arange(len(counts), device=counts.device)
        self.texts = self.all.repeat_interleave(counts)

    def __len__(self) -> int:
        return len(self.counts)

    def entries_of(self, places: Tensor) -> tuple[Tensor, Tensor]:
        """The entries of the texts at places [n], which may repeat: for each entry, the row of its text among these n,
        ascending, and the place of the entry; int64 [entries of these]."""
        counts = self.counts[places]
        rows = torch.arange(len(places), device=counts.device).repeat_interleave(counts)
        within = torch.arange(len(rows), device=counts.device) - (counts.cumsum(0) - counts)[rows]
        return rows, self.starts[places][rows] + within
