"""What a model gave for texts, chosen, joined and gathered by texts, whatever represents them.

Each representation is a tensor of entries, text after text: one vector of a text, the weights of its tokens, or the
vectors of its tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as distributed
from torch import Tensor, nn

from rag_retrieval.losses.step_outputs import StepOutputs
from rag_retrieval.models.outputs import places_of
from rag_retrieval.models.representations import DENSE, LEXICAL, MULTI_VECTOR, Representations


@dataclass(frozen=True)
class Entries:
    """One representation of some texts. values: [entries] or [entries, width]. counts: int64 [texts], of the entries of
    each. ids: int64 [entries], token ids of lexical weights, ascending in a text; None for others."""

    values: Tensor
    counts: Tensor
    ids: Tensor | None = None

    def at(self, texts: Tensor) -> "Entries":
        """Of the texts at these places, in this order."""
        places = places_of(self.counts, texts)
        ids = None if self.ids is None else self.ids[places]
        return Entries(self.values[places], self.counts[texts], ids)

    def first(self, texts: int) -> "Entries":
        if texts == len(self.counts):
            return self
        counts = self.counts[:texts]
        entries = int(counts.sum())
        return Entries(self.values[:entries], counts, None if self.ids is None else self.ids[:entries])

    def detach(self) -> "Entries":
        return Entries(self.values.detach(), self.counts, self.ids)

    def to(self, device: torch.device | str) -> "Entries":
        ids = None if self.ids is None else self.ids.to(device)
        return Entries(self.values.to(device), self.counts.to(device), ids)


Outputs = dict[str, Entries]  # by representation


def outputs_of(given: Representations) -> Outputs:
    outputs = {}
    if given.dense is not None:
        counts = torch.ones(len(given.dense), dtype=torch.int64, device=given.dense.device)
        outputs[DENSE] = Entries(given.dense, counts)
    if given.lexical is not None:
        outputs[LEXICAL] = Entries(given.lexical.weights, given.lexical.counts, given.lexical.ids)
    if given.multi_vector is not None:
        outputs[MULTI_VECTOR] = Entries(given.multi_vector.vectors, given.multi_vector.counts)
    return outputs


def step_outputs(outputs: Outputs) -> StepOutputs:
    """For the losses."""
    dense, lexical, multi_vector = (outputs.get(name) for name in (DENSE, LEXICAL, MULTI_VECTOR))
    return StepOutputs(
        dense and dense.values,
        lexical and (lexical.ids, lexical.values, lexical.counts),
        multi_vector and (multi_vector.values, multi_vector.counts),
    )


def of_texts(outputs: Outputs, texts: Tensor) -> Outputs:
    """Of the texts at these places, in this order."""
    return {name: entries.at(texts) for name, entries in outputs.items()}


def on_device(outputs: Outputs, device: torch.device | str) -> Outputs:
    return {name: entries.to(device) for name, entries in outputs.items()}


def joined(outputs: Sequence[Outputs]) -> Outputs:
    """Of the texts of all, one after another."""
    return {name: _joined([each[name] for each in outputs]) for name in outputs[0]}


def _joined(parts: Sequence[Entries]) -> Entries:
    if len(parts) == 1:
        return parts[0]
    ids = None if parts[0].ids is None else torch.cat([part.ids for part in parts])
    return Entries(torch.cat([part.values for part in parts]), torch.cat([part.counts for part in parts]), ids)


def gather_outputs(outputs: Outputs, texts: Sequence[int]) -> Outputs:
    """Those of all processes, one after another. texts: of each process."""
    return outputs if len(texts) == 1 else {name: _gathered(own, texts) for name, own in outputs.items()}


def _gathered(own: Entries, texts: Sequence[int]) -> Entries:
    counts = gather_rows(own.counts, texts)
    entries = [int(part.sum()) for part in counts.split(list(texts))]
    ids = None if own.ids is None else gather_rows(own.ids, entries)
    return Entries(gather_rows(own.values, entries), counts, ids)


def gather_rows(rows: Tensor, counts: Sequence[int]) -> Tensor:
    """The rows of all processes one after another: [sum of counts, ...]. counts: rows of each process."""
    longest = rows.new_zeros(max(counts), *rows.shape[1:])
    longest[: len(rows)] = rows
    parts = [torch.empty_like(longest) for _ in counts]
    distributed.all_gather(parts, longest)
    return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)])


def matched(gradient: Tensor, before: Entries, now: Entries) -> Tensor:
    """The gradient at entries of one forward, for those of another forward of the same texts: [entries now, ...].

    Entries of SPLADE are those above 0, and rounding may bring one there or not. They are matched by text and token
    id; one that the first forward did not have gets no gradient.
    """
    if before.ids is None or torch.equal(before.ids, now.ids) and torch.equal(before.counts, now.counts):
        return gradient
    result = gradient.new_zeros(len(now.ids))
    known, wanted = _keys(before), _keys(now)
    if len(known):
        places = torch.searchsorted(known, wanted).clamp(max=len(known) - 1)
        same = known[places] == wanted
        result[same] = gradient[places[same]]
    return result


def difference(one: Outputs, other: Outputs) -> float:
    """The largest difference between two models' outputs for the same texts: of dense vectors brought to length 1, and
    of weights and token vectors as they are. Infinite where the numbers of token vectors or widths differ."""
    return max(_difference(name, entries, other[name]) for name, entries in one.items())


def _difference(name: str, one: Entries, other: Entries) -> float:
    first, second = one.values, other.values
    if name == DENSE:
        first, second = (nn.functional.normalize(values) for values in (first, second))
    if one.ids is not None:  # an entry that one of them lacks is 0 there
        ways = ((first, matched(second, other, one)), (second, matched(first, one, other)))
    elif first.shape == second.shape:
        ways = ((first, second),)
    else:
        return float("inf")
    return max(float((values - others).abs().max()) if len(values) else 0.0 for values, others in ways)


def _keys(lexical: Entries) -> Tensor:
    """An ascending number for each text and token id: int64 [entries]."""
    texts = torch.arange(len(lexical.counts), device=lexical.ids.device)
    return texts.repeat_interleave(lexical.counts) << 32 | lexical.ids
