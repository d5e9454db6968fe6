"""Scores and gradients of lexical weights and token vectors of a step: by hand and against plain loops."""

from dataclasses import replace

import pytest
import torch
from representation_samples import (
    Slow,
    assert_same,
    gradients_of,
    random_outputs,
    slow_gradients,
    slow_info_nce,
    tensors,
)
from step_samples import LargestTensor, random_step

from rag_retrieval.losses import step_tokens, step_weights
from rag_retrieval.losses.embedding import objective_of
from rag_retrieval.losses.step_gradients import representation_gradients, rows_of_step, texts_of
from rag_retrieval.losses.step_targets import targets_of
from rag_retrieval.losses.step_tokens import StepTokens
from rag_retrieval.losses.step_weights import StepWeights
from rag_retrieval.losses.unified import unified

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc", "own_documents")
of_each = pytest.mark.parametrize("name", ["lexical", "multi_vector"])


def objective(name, mean=False, **options):
    return unified(objective_of({"info_nce": 1.0}, {"temperature": 0.5, **options}), [name], multi_vector_mean=mean)


def test_lexical_scores_are_sums_over_common_ids():
    queries = StepWeights(torch.tensor([2, 5, 9, 5]), torch.tensor([0.5, 2.0, 1.0, 3.0]), torch.tensor([3, 1]))
    documents = StepWeights(torch.tensor([5, 9, 2, 4]), torch.tensor([0.1, 0.2, 4.0, 7.0]), torch.tensor([2, 0, 2]))
    # 2 * .1 + 1 * .2, nothing in common with no words, .5 * 4
    expected = torch.tensor([[0.4, 0.0, 2.0], [0.3, 0.0, 0.0]])
    (scores,) = queries.against(slice(None), documents)
    torch.testing.assert_close(scores.detach(), expected)
    (own,) = queries.with_own(torch.tensor([1, 0]), documents, torch.tensor([[0, 1], [2, 2]]))
    torch.testing.assert_close(own.detach(), torch.tensor([[0.3, 0.0], [2.0, 2.0]]))
    scores[0].sum().backward()
    assert queries.gradient().tolist() == pytest.approx([4.0, 0.1, 0.2, 0.0])
    assert documents.gradient().tolist() == pytest.approx([2.0, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("mean", [False, True])
def test_maxsim_sums_the_nearest_document_vector_of_each_query_vector(mean):
    queries = StepTokens(torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8]]), torch.tensor([2, 1]), mean)
    documents = StepTokens(torch.tensor([[0.6, 0.8], [0.0, -1.0], [-1.0, 0.0]]), torch.tensor([2, 0, 1]), mean)
    share = 0.5 if mean else 1.0
    # (.6 + .8) with the first document, no vector in the second, (-1 + 0) with the third
    expected = torch.tensor([[1.4 * share, 0.0, -1.0 * share], [1.0, 0.0, -0.6]])
    (scores,) = queries.against(slice(None), documents)
    torch.testing.assert_close(scores.detach(), expected)
    (own,) = queries.with_own(torch.tensor([1, 0]), documents, torch.tensor([[0, 1], [2, 2]]))
    torch.testing.assert_close(own.detach(), torch.tensor([[1.0, 0.0], [-share, -share]]))
    scores[0, 0].backward()
    torch.testing.assert_close(queries.gradient(), share * torch.tensor([[0.6, 0.8], [0.6, 0.8], [0.0, 0.0]]))
    torch.testing.assert_close(documents.gradient(), share * torch.tensor([[1.0, 1.0], [0.0, 0.0], [0.0, 0.0]]))


@of_each
@pytest.mark.parametrize("direction", DIRECTIONS)
def test_scores_and_gradients_in_all_directions_are_those_of_loops(name, direction, monkeypatch):
    for module in (step_weights, step_tokens):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 40)  # several chunks
    step = random_step()
    queries, documents = random_outputs(step, (name,))
    targets = targets_of(step.query_ids, step.document_ids, [step.records])
    sides = {"query_to_query": (queries, queries), "doc_to_doc": (documents, documents)}.get(
        direction, (queries, documents)
    )
    texts = [texts_of(objective(name), each) for each in (queries, documents)]
    rows = replace(rows_of_step(objective(name), *texts, targets, None)[name], rows=slice(1, 6))
    slow = Slow(sides)
    matrix = slow.scores(name)
    own = {"doc_to_doc": rows.positives, "doc_to_query": rows.positives}.get(direction, rows.own_queries)
    expected = matrix.T[own] if direction == "doc_to_query" else matrix[own]
    held = torch.ones_like(expected)
    if direction == "own_documents":
        held = (rows.own_documents >= 0).double()
        expected = expected.gather(1, rows.own_documents.clamp(min=0))
    found = rows.scores(direction)
    torch.testing.assert_close(found.double() * held, expected.detach() * held, rtol=1e-5, atol=1e-6)
    slopes = torch.linspace(-1, 2, expected.numel()).view(expected.shape) * held
    (found * slopes).sum().backward()
    grads = torch.autograd.grad((expected * slopes).sum(), list(slow.leaves.values()))
    if direction in ("query_to_query", "doc_to_doc"):
        grads = [sum(grads)]
        texts = texts[:1] if direction == "query_to_query" else texts[1:]
    for side, gradient in zip(texts, grads, strict=True):
        torch.testing.assert_close(side[name].gradient().double(), gradient.double(), rtol=1e-5, atol=1e-6)


@of_each
@pytest.mark.parametrize("mean", [False, True])
def test_a_loss_and_its_gradients_are_those_of_loops(name, mean):
    step = random_step()
    outputs = random_outputs(step, (name,))
    slow = Slow(outputs, mean)
    expected = slow_gradients(slow, slow_info_nce(step, slow.scores(name), 0.5), factor=0.5)
    assert_same(tensors(gradients_of(step, outputs, objective(name, mean), factor=0.5)), expected)


@of_each
@pytest.mark.parametrize("use_inbatch_neg", [True, False])
def test_blocks_and_processes_change_nothing(name, use_inbatch_neg):
    step = random_step(records=9)
    outputs = random_outputs(step, (name,))
    wanted = objective(name, use_inbatch_neg=use_inbatch_neg)
    whole = gradients_of(step, outputs, wanted)
    for cut in ({"sizes": [2, 4, 3]}, {"sizes": [0, 9]}, {"block_elements": 1}, {"block_elements": 200}):
        found = gradients_of(step, outputs, wanted, **cut)
        assert_same(tensors(found), tensors(whole), tolerance=2e-6)
        assert found.report == pytest.approx(whole.report, rel=1e-5)


def test_no_matrix_over_the_vocabulary_or_of_all_tokens_exists(monkeypatch):
    for module in (step_weights, step_tokens):
        monkeypatch.setattr(module, "CHUNK_ELEMENTS", 1 << 13)
    step = random_step(records=64)
    queries, documents = random_outputs(step)
    ids, weights, counts = documents.lexical
    lexical = (ids * 10_000, weights, counts)  # a vocabulary of 230,000
    for name, outputs in (
        ("lexical", (replace(queries, lexical=(queries.lexical[0] * 10_000, *queries.lexical[1:])),
                     replace(documents, lexical=lexical))),
        ("multi_vector", (queries, documents)),
    ):  # fmt: skip
        alone = tuple(replace(each, **dict.fromkeys({"dense", "lexical", "multi_vector"} - {name})) for each in outputs)
        with LargestTensor() as largest:
            gradients_of(step, alone, objective(name), block_elements=1 << 13)
        texts, tokens = len(documents.dense), len(documents.multi_vector[0])
        assert texts > 100 and tokens * len(queries.multi_vector[0]) > 1 << 16
        # ids have one table over the vocabulary, of a number each, whatever the number of texts
        assert largest.values <= (230_000 if name == "lexical" else 1 << 13)


def test_a_step_without_records_of_its_own_and_without_texts_has_no_gradient():
    step = random_step(records=3)
    outputs = random_outputs(step, ("lexical", "multi_vector"))
    wanted = unified(objective_of({"info_nce": 1.0}), ["lexical", "multi_vector"])
    targets = targets_of(step.query_ids, step.document_ids, step.parts([0, 3]), 0)
    found = representation_gradients(wanted, *outputs, targets, 1.0)
    assert found.losses.shape == (0,)
    assert not found.queries.lexical.any() and found.documents.multi_vector.shape == outputs[1].multi_vector[0].shape
