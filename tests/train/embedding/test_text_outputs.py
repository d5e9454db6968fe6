"""Entries of texts, chosen and joined by text, and gradients matched between two forwards; by hand."""

import torch

from rag_retrieval.models.outputs import places_of
from rag_retrieval.models.representations import Lexical, Representations, TokenVectors
from rag_retrieval.train.embedding.text_outputs import (
    Entries,
    difference,
    joined,
    matched,
    outputs_of,
    step_outputs,
)


def lexical(*texts: dict[int, float]) -> Entries:
    """By the weights of each text's tokens."""
    counts = torch.tensor([len(text) for text in texts])
    ids, weights = [token for text in texts for token in text], [value for text in texts for value in text.values()]
    return Entries(torch.tensor(weights), counts, torch.tensor(ids, dtype=torch.int64))


def test_the_entries_of_texts_stand_where_their_counts_say():
    counts = torch.tensor([2, 0, 3, 1])
    assert places_of(counts, torch.tensor([3, 0, 1, 2, 0])).tolist() == [5, 0, 1, 2, 3, 4, 0, 1]
    assert places_of(counts, torch.tensor([], dtype=torch.int64)).tolist() == []


def test_texts_are_chosen_with_all_that_is_theirs():
    entries = lexical({4: 0.5, 9: 1.0}, {}, {2: 3.0})
    chosen = entries.at(torch.tensor([2, 0]))
    assert (chosen.ids.tolist(), chosen.counts.tolist()) == ([2, 4, 9], [1, 2])
    assert chosen.values.tolist() == [3.0, 0.5, 1.0]
    assert entries.first(2).ids.tolist() == [4, 9] and entries.first(0).values.shape == (0,)
    assert entries.first(3) is entries


def test_what_a_model_gives_goes_to_the_losses_as_it_is():
    given = Representations(
        torch.ones(2, 3),
        Lexical(torch.tensor([7]), torch.tensor([0.5]), torch.tensor([0, 1])),
        TokenVectors(torch.eye(3), torch.tensor([1, 2])),
    )
    two = joined([outputs_of(given), outputs_of(given)])
    found = step_outputs(two)
    assert found.dense.shape == (4, 3)
    assert [part.tolist() for part in found.lexical] == [[7, 7], [0.5, 0.5], [0, 1, 0, 1]]
    assert found.multi_vector[0].shape == (6, 3) and found.multi_vector[1].tolist() == [1, 2, 1, 2]
    assert list(outputs_of(Representations(lexical=given.lexical))) == ["lexical"]
    alone = step_outputs(outputs_of(Representations(lexical=given.lexical)))
    assert alone.dense is None and alone.multi_vector is None


def test_gradients_follow_an_entry_that_a_second_forward_has_or_has_not():
    before = lexical({1: 1.0, 5: 1.0}, {1: 1.0}, {3: 1.0})
    gradient = torch.tensor([10.0, 20.0, 30.0, 40.0])
    same = lexical({1: 2.0, 5: 2.0}, {1: 2.0}, {3: 2.0})
    assert matched(gradient, before, same) is gradient
    now = lexical({5: 1.0}, {1: 1.0, 3: 1.0}, {})
    assert matched(gradient, before, now).tolist() == [20.0, 30.0, 0.0]
    moved = lexical({1: 1.0}, {1: 1.0, 5: 1.0}, {3: 1.0})  # the same ids one after another
    assert matched(gradient, before, moved).tolist() == [10.0, 30.0, 0.0, 40.0]
    assert matched(torch.zeros(0), lexical({}), lexical({4: 1.0})).tolist() == [0.0]


def test_the_difference_of_outputs_is_the_largest_of_any_representation():
    def outputs(dense, weights, vectors):
        entries = {"dense": Entries(torch.tensor(dense), torch.tensor([1])), "lexical": lexical(weights)}
        return entries | {"multi_vector": Entries(torch.tensor(vectors), torch.tensor([len(vectors)]))}

    one = outputs([[3.0, 4.0]], {1: 0.5}, [[1.0, 0.0]])
    assert difference(one, outputs([[6.0, 8.0]], {1: 0.5}, [[1.0, 0.0]])) == 0, "dense vectors of one direction"
    for weights, expected in (({1: 0.75}, 0.25), ({1: 0.5, 2: 2.0}, 2.0), ({}, 0.5)):
        for first, second in ((one, one | {"lexical": lexical(weights)}), (one | {"lexical": lexical(weights)}, one)):
            assert difference(first, second) == expected
    assert difference(one, outputs([[3.0, 4.0]], {1: 0.5}, [[0.0, 1.0]])) == 1
    assert difference(one, outputs([[3.0, 4.0]], {1: 0.5}, [[1.0, 0.0], [1.0, 0.0]])) == float("inf")
