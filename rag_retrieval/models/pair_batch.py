"""A batch of encoded pairs, as lists of token ids with their lengths, and the two ways to lay it out.

Padded, every pair is a row as long as the longest. Packed, all pairs stand in one row, one after another, and
nothing is computed for padding. A layout is made inside the model's forward and nowhere else, so that nothing
outside can depend on it.

What a reader would get wrong: lengths stay Python numbers on the host. Read from the device they would make the
host wait for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rag_retrieval.models.pair_encoding import EncodedPair


@dataclass
class PairBatch:
    """token_ids, token_types: [tokens], int64, the pairs one after another.

    lengths: tokens of each pair. shared: how many tokens at the beginning of a pair, up to its document, are those
    of the pair before it; 0 where they differ.
    """

    token_ids: torch.Tensor
    token_types: torch.Tensor | None
    lengths: list[int]
    shared: list[int]

    def __len__(self) -> int:
        return len(self.lengths)

    def to(self, device: torch.device) -> "PairBatch":
        ids, types = (None if tensor is None else tensor.to(device, non_blocking=True) for tensor in self._tensors)
        return PairBatch(ids, types, self.lengths, self.shared)

    def pin_memory(self) -> "PairBatch":
        ids, types = (None if tensor is None else tensor.pin_memory() for tensor in self._tensors)
        return PairBatch(ids, types, self.lengths, self.shared)

    @property
    def _tensors(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        return self.token_ids, self.token_types


def make_batch(pairs: Sequence[EncodedPair]) -> PairBatch:
    """Lay pairs one after another. The batch must hold at least one pair."""
    assert pairs, "a batch holds at least one pair"
    types = None
    if pairs[0].types is not None:
        types = torch.tensor([kind for pair in pairs for kind in pair.types])
    ids = torch.tensor([token for pair in pairs for token in pair.ids])
    return PairBatch(ids, types, [len(pair) for pair in pairs], shared_beginnings(pairs))


def shared_beginnings(pairs: Sequence[EncodedPair]) -> list[int]:
    """See `PairBatch.shared`."""
    shared = [0]
    for before, pair in zip(pairs, pairs[1:], strict=False):
        start = pair.document_start
        same = before.document_start == start and before.ids[:start] == pair.ids[:start]
        shared.append(start if same else 0)
    return shared


def on_device(values: Sequence[int], device: torch.device) -> torch.Tensor:
    """Host numbers as an int64 tensor, copied without waiting for the device."""
    tensor = torch.tensor(values)
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def padded_inputs(batch: PairBatch, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-padded model inputs: input_ids, attention_mask and, where the family has them, token_type_ids.

    Each is [pairs, longest], int64. masked_scatter_ fills row by row without asking the device for a count.
    """
    device = batch.token_ids.device
    longest = max(batch.lengths)
    real = torch.arange(longest, device=device) < on_device(batch.lengths, device)[:, None]
    shape = (len(batch), longest)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64, device=device)
    inputs = {"input_ids": input_ids.masked_scatter_(real, batch.token_ids), "attention_mask": real.long()}
    if batch.token_types is not None:
        types = torch.zeros(shape, dtype=torch.int64, device=device)
        inputs["token_type_ids"] = types.masked_scatter_(real, batch.token_types)
    return inputs
