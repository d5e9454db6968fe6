"""A batch of encoded pairs, unpadded, and how it is laid out for a model.

The ids of all pairs stand one after another with their lengths beside them. Padding happens inside the
model's forward and nowhere else, so that nothing outside can depend on it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rag_retrieval.models.pair_encoding import EncodedPair


@dataclass
class PairBatch:
    """token_ids, token_types: [tokens], int64; lengths: [pairs], int64; longest: max of lengths."""

    token_ids: torch.Tensor
    token_types: torch.Tensor | None
    lengths: torch.Tensor
    longest: int

    def __len__(self) -> int:
        return self.lengths.shape[0]

    def to(self, device: torch.device) -> "PairBatch":
        def move(tensor):
            return None if tensor is None else tensor.to(device, non_blocking=True)

        return PairBatch(move(self.token_ids), move(self.token_types), move(self.lengths), self.longest)

    def pin_memory(self) -> "PairBatch":
        types = None if self.token_types is None else self.token_types.pin_memory()
        return PairBatch(self.token_ids.pin_memory(), types, self.lengths.pin_memory(), self.longest)


def make_batch(pairs: Sequence[EncodedPair]) -> PairBatch:
    """Lay pairs one after another. The batch must hold at least one pair."""
    assert pairs, "a batch holds at least one pair"
    lengths = [len(pair) for pair in pairs]
    types = None
    if pairs[0].types is not None:
        types = torch.tensor([kind for pair in pairs for kind in pair.types])
    ids = torch.tensor([token for pair in pairs for token in pair.ids])
    return PairBatch(ids, types, torch.tensor(lengths), max(lengths))


def padded_inputs(batch: PairBatch, pad_token_id: int) -> dict[str, torch.Tensor]:
    """Right-padded model inputs: input_ids, attention_mask and, where the family has them, token_type_ids.

    Each is [pairs, longest], int64. masked_scatter_ fills row by row without asking the device for a count.
    """
    device = batch.token_ids.device
    real = torch.arange(batch.longest, device=device) < batch.lengths[:, None]
    shape = (len(batch), batch.longest)
    input_ids = torch.full(shape, pad_token_id, dtype=torch.int64, device=device)
    inputs = {"input_ids": input_ids.masked_scatter_(real, batch.token_ids), "attention_mask": real.long()}
    if batch.token_types is not None:
        types = torch.zeros(shape, dtype=torch.int64, device=device)
        inputs["token_type_ids"] = types.masked_scatter_(real, batch.token_types)
    return inputs
