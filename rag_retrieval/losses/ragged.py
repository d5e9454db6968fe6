"""Texts of different numbers of entries, such as tokens, one after another in one tensor."""

import torch
from torch import Tensor


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
