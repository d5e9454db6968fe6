"""What a model may give for the texts of a step in every representation, and scores and losses of it by plain loops."""

from collections.abc import Mapping

import numpy as np
import torch
from step_samples import Step
from torch import Tensor

from rag_retrieval.losses.embedding import Objective
from rag_retrieval.losses.step_gradients import StepGradients, representation_gradients
from rag_retrieval.losses.step_outputs import OutputGradients, StepOutputs
from rag_retrieval.losses.step_targets import targets_of

VOCABULARY, WIDTH = 23, 5


def random_outputs(step: Step, names=("dense", "lexical", "multi_vector"), seed=0) -> tuple[StepOutputs, StepOutputs]:
    """Of queries and documents. The last document has no entry and no token vector, and every third weight is 0."""
    numbers = np.random.default_rng(seed)
    return _outputs(step.queries, names, numbers, False), _outputs(step.documents, names, numbers, True)


def _outputs(dense: Tensor, names, numbers, one_empty: bool) -> StepOutputs:
    entries, tokens = (numbers.integers(1, 8, len(dense)) for _ in range(2))
    if one_empty:
        entries[-1] = tokens[-1] = 0
    ids = np.concatenate([np.sort(numbers.choice(VOCABULARY, count, replace=False)) for count in entries])
    weights = numbers.random(len(ids)).astype(np.float32) * (np.arange(len(ids)) % 3 > 0)
    vectors = torch.from_numpy(numbers.normal(size=(tokens.sum(), WIDTH)).astype(np.float32))
    every = {
        "dense": dense,
        "lexical": tuple(torch.from_numpy(each) for each in (ids, weights.astype(np.float32), entries)),
        "multi_vector": (torch.nn.functional.normalize(vectors, dim=1), torch.from_numpy(tokens)),
    }
    return StepOutputs(**{name: every[name] for name in names})


def gradients_of(
    texts: Step, outputs, objective: Objective, sizes: list[int] | None = None, **options
) -> StepGradients:
    """Of all records of a step of these texts, added up over processes with these numbers of records."""
    parts = texts.parts(sizes or [len(texts.records.query_ids)])
    done = [
        representation_gradients(
            objective, *outputs, targets_of(texts.query_ids, texts.document_ids, parts, process),
            **{"factor": 1.0, **options},
        )
        for process in range(len(parts))
    ]  # fmt: skip

    def added(sides: list[OutputGradients]) -> OutputGradients:
        return OutputGradients(*(None if each[0] is None else sum(each) for each in zip(*sides, strict=True)))

    return StepGradients(
        torch.cat([each.losses for each in done]),
        added([each.queries for each in done]),
        added([each.documents for each in done]),
        {name: sum(each.report[name] for each in done) for name in done[0].report},
    )


def tensors(found: StepGradients) -> dict[str, Tensor]:
    """Losses and gradients by name."""
    sides = {"queries": found.queries, "documents": found.documents}
    every = {f"{side}.{name}": value for side, each in sides.items() for name, value in each._asdict().items()}
    return {"losses": found.losses} | {name: value for name, value in every.items() if value is not None}


class Slow:
    """The texts of a step as float64 leaves of autograd, and their scores pair by pair."""

    def __init__(self, outputs: tuple[StepOutputs, StepOutputs], mean: bool = False):
        self.outputs, self.mean, self.leaves = outputs, mean, {}
        for side, each in zip(("queries", "documents"), outputs, strict=True):
            of = {"dense": each.dense, "lexical": each.lexical and each.lexical[1]}
            of["multi_vector"] = each.multi_vector and each.multi_vector[0]
            for name, tensor in of.items():
                if tensor is not None:
                    self.leaves[f"{side}.{name}"] = tensor.double().requires_grad_()

    def scores(self, name: str) -> Tensor:
        """Of all queries with all documents: [Q, D]."""
        pair = {"dense": self._cosine, "lexical": self._common_ids, "multi_vector": self._maxsim}[name]
        counts = [len(each.dense if each.dense is not None else (each.lexical or each.multi_vector)[-1])
                  for each in self.outputs]  # fmt: skip
        return torch.stack([torch.stack([pair(q, d) for d in range(counts[1])]) for q in range(counts[0])])

    def _cosine(self, query: int, document: int) -> Tensor:
        left, right = self.leaves["queries.dense"][query], self.leaves["documents.dense"][document]
        return torch.nn.functional.cosine_similarity(left, right, dim=0)

    def _common_ids(self, query: int, document: int) -> Tensor:
        left, right = self._weights("queries", query), self._weights("documents", document)
        return sum((weight * right[key] for key, weight in left.items() if key in right), torch.tensor(0.0).double())

    def _weights(self, side: str, place: int) -> Mapping[int, Tensor]:
        ids, _, counts = self.outputs[side == "documents"].lexical
        start = int(counts[:place].sum())
        own = slice(start, start + int(counts[place]))
        return dict(zip(ids[own].tolist(), self.leaves[f"{side}.lexical"][own], strict=True))

    def _maxsim(self, query: int, document: int) -> Tensor:
        left, right = self._tokens("queries", query), self._tokens("documents", document)
        if not len(left) or not len(right):
            return torch.tensor(0.0).double()
        total = sum(torch.stack([vector @ other for other in right]).max() for vector in left)
        return total / len(left) if self.mean else total

    def _tokens(self, side: str, place: int) -> Tensor:
        counts = self.outputs[side == "documents"].multi_vector[1]
        start = int(counts[:place].sum())
        return self.leaves[f"{side}.multi_vector"][start : start + int(counts[place])]


def slow_info_nce(step: Step, scores: Tensor, temperature: float) -> Tensor:
    """[records], from the scores of all queries with all documents [Q, D]: a query's other known positives are left
    out."""
    records, losses = step.records, []
    known: dict[int, set[int]] = {}
    for i, query in enumerate(records.query_ids.tolist()):
        own = records.known_positive_ids[slice(*records.known_positive_offsets[i : i + 2])]
        known.setdefault(query, set()).update(own.tolist(), [int(records.positive_ids[i])])
    for query, positive in zip(records.query_ids.tolist(), records.positive_ids.tolist(), strict=True):
        row = scores[step.query_ids.tolist().index(query)] / temperature
        kept = [
            logit
            for document, logit in zip(step.document_ids.tolist(), row, strict=True)
            if document == positive or document not in known[query]
        ]
        losses.append(torch.stack(kept).logsumexp(dim=0) - row[step.document_ids.tolist().index(positive)])
    return torch.stack(losses)


def slow_gradients(slow: Slow, losses: Tensor, factor: float = 1.0) -> dict[str, Tensor]:
    """As `tensors`, of the leaves that the losses depend on."""
    found = torch.autograd.grad(factor * losses.sum(), list(slow.leaves.values()), allow_unused=True)
    values = zip(slow.leaves.items(), found, strict=True)
    return {"losses": losses.detach()} | {
        name: torch.zeros_like(leaf) if gradient is None else gradient for (name, leaf), gradient in values
    }


def assert_same(found: Mapping[str, Tensor], expected: Mapping[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        scale = float(value.abs().max())
        torch.testing.assert_close(found[name].double(), value.double(), rtol=tolerance, atol=tolerance * scale,
                                   msg=lambda text, name=name: f"{name}: {text}")  # fmt: skip
