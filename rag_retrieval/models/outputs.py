"""What the forwards of a model gave, put together on the CPU in the order of their texts.

A forward gives scores [texts], or `Representations`, whose lexical weights and token vectors are ragged: the entries of
one text after those of another, with their counts.
"""

from collections.abc import Iterable, Sequence
from itertools import chain

import torch
from torch import Tensor

from rag_retrieval.models.representations import Representations, TokenVectors

Output = Tensor | Representations
Results = tuple[list[int], Output]  # positions of the texts of some forwards, and what these gave, on the CPU
NOTHING = torch.empty(0)


def concatenated(outputs: Sequence[Output]) -> Output:
    """Of one batch of texts after another, on the CPU: each tensor is copied from its device once. NOTHING of none."""
    if not outputs:
        return NOTHING
    first = outputs[0]
    if first is None or isinstance(first, Tensor):
        return first if first is None else torch.cat(list(outputs)).cpu()
    return type(first)(*map(concatenated, zip(*outputs, strict=True)))


def with_token_vectors_on_cpu(output: Output) -> Output:
    """Those of many forwards would fill the memory of a device: some hundred for a text."""
    if isinstance(output, Tensor) or output.multi_vector is None:
        return output
    return output._replace(multi_vector=TokenVectors(*(part.cpu() for part in output.multi_vector)))


def in_order(results: Iterable[Results]) -> Output:
    """The results by their positions, which are 0, 1, ... in any order; NOTHING where there are none."""
    parts = [(positions, output) for positions, output in results if positions]
    row_of = torch.tensor(list(chain.from_iterable(positions for positions, _ in parts)), dtype=torch.long)
    return taken(concatenated([output for _, output in parts]), row_of.argsort())


def taken(output: Output, rows: Tensor) -> Output:
    """The texts at `rows` [texts], int64, in that order."""
    if isinstance(output, Tensor):
        return output[rows]
    if isinstance(output, Representations):
        return Representations(*(None if part is None else taken(part, rows) for part in output))
    *values, counts = output
    entries = places_of(counts, rows)
    return type(output)(*(each[entries] for each in values), counts[rows])


def places_of(counts: Tensor, texts: Tensor) -> Tensor:
    """Where the entries of these texts stand, text after text: int64. counts: int64 [all texts], entries of each."""
    wanted = counts[texts]
    shifts = (counts.cumsum(0) - counts)[texts] - (wanted.cumsum(0) - wanted)
    return torch.arange(int(wanted.sum()), device=counts.device) + shifts.repeat_interleave(wanted)
