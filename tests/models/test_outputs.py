"""Ragged outputs of several forwards, put in the order of their texts."""

import torch

from rag_retrieval.models.outputs import NOTHING, in_order, taken
from rag_retrieval.models.representations import Lexical, Representations, TokenVectors

COUNTS = {0: 2, 1: 0, 2: 3, 3: 1}  # entries of each text; entry k of text t has the id 10 t + k
ENTRIES = {text: [10 * text + entry for entry in range(count)] for text, count in COUNTS.items()}


def output_of(texts: list[int], dense: bool = True) -> Representations:
    """What a forward over these texts would give: every number says whose it is."""
    ids = torch.tensor([entry for text in texts for entry in ENTRIES[text]])
    counts = torch.tensor([COUNTS[text] for text in texts])
    vectors = ids[:, None] * torch.tensor([[1.0, 100.0]])
    vector = torch.tensor(texts, dtype=torch.float32)[:, None]
    return Representations(vector if dense else None, Lexical(ids, ids / 2, counts), TokenVectors(vectors, counts))


def check(found: Representations, texts: list[int]) -> None:
    expected = output_of(texts)
    assert torch.equal(found.dense, expected.dense)
    for part in ("lexical", "multi_vector"):
        for mine, own in zip(getattr(found, part), getattr(expected, part), strict=True):
            assert torch.equal(mine, own)


def test_every_text_gets_its_own_entries_back():
    forwards = [([2, 0], output_of([2, 0])), ([], NOTHING), ([3], output_of([3])), ([1], output_of([1]))]
    check(in_order(forwards), [0, 1, 2, 3])
    check(taken(output_of([0, 1, 2, 3]), torch.tensor([3, 3, 1, 0, 2])), [3, 3, 1, 0, 2])


def test_what_a_model_does_not_give_stays_none():
    found = in_order([([1, 0], output_of([1, 0], dense=False))])
    assert found.dense is None and found.lexical.counts.tolist() == [2, 0]


def test_scores_are_put_in_order_and_no_text_gives_nothing():
    assert in_order([([2, 0], torch.tensor([2.0, 0.0])), ([1], torch.tensor([1.0]))]).tolist() == [0, 1, 2]
    assert in_order([]).shape == in_order([([], NOTHING)]).shape == (0,)
