"""Losses of graded pairs: by hand, against sentence-transformers, and over processes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import CoSENTLoss
from step_samples import DIM, gradients, random_step, step_records, vector_gradients

from rag_retrieval.losses.embedding import objective_of
from rag_retrieval.losses.step_targets import targets_of


def pairs(labels, seed=0):
    generator = torch.Generator().manual_seed(seed)
    queries, documents = torch.randn(2, len(labels), DIM, generator=generator)
    ids = np.arange(len(labels), dtype=np.uint64)
    return queries, documents, targets_of(ids, ids, [step_records(ids, ids, labels=labels)])


def test_cosent_by_hand():
    directions = [0.5, 0.3, 0.4]  # cosines with the query
    queries = torch.tensor([[1.0, 0.0]]).expand(3, 2)
    documents = torch.tensor([[c, math.sqrt(1 - c * c)] for c in directions])
    ids = np.arange(3, dtype=np.uint64)
    targets = targets_of(ids, ids, [step_records(ids, ids, labels=[0.0, 1.0, 1.0])])
    found = vector_gradients(objective_of({"cosent": 1.0}, {"temperature": 0.1}), queries, documents, targets, 1.0)
    # the first pair has the lowest label: e^2 against the second, e^1 against the third
    assert found.losses.tolist() == pytest.approx([math.log(1 + math.exp(2) + math.exp(1))] * 3, rel=1e-5)
    assert found.report["dense/positive_score"] == pytest.approx(1.2)


@pytest.mark.parametrize("labels", [[0.1, 0.9, 0.5, 0.9, 0.1, 0.3], [1.0] * 4, [2.0]])
def test_value_and_gradient_of_sentence_transformers_cosent(labels):
    queries, documents, targets = pairs(labels)
    leaves = [each.clone().requires_grad_() for each in (queries, documents)]
    expected = CoSENTLoss(None, scale=20.0).compute_loss_from_embeddings(leaves, torch.tensor(labels))
    grads = torch.autograd.grad(expected, leaves)
    found = vector_gradients(objective_of({"cosent": 1.0}), queries, documents, targets, factor=1 / len(labels))
    torch.testing.assert_close(found.losses.mean(), expected.detach())
    torch.testing.assert_close(found.queries, grads[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.documents, grads[1], rtol=1e-4, atol=1e-6)


def test_cosine_regression_is_the_squared_error_of_the_cosine():
    labels = [0.2, -1.0, 0.7]
    queries, documents, targets = pairs(labels)
    leaves = [each.clone().requires_grad_() for each in (queries, documents)]
    expected = (F.cosine_similarity(*leaves) - torch.tensor(labels)).square()
    grads = torch.autograd.grad(expected.sum(), leaves)
    found = vector_gradients(objective_of({"cosine_regression": 1.0}), queries, documents, targets, factor=1.0)
    torch.testing.assert_close(found.losses, expected.detach())
    torch.testing.assert_close(found.queries, grads[0])
    torch.testing.assert_close(found.documents, grads[1])


@pytest.mark.parametrize("name", ["cosent", "cosine_regression"])
def test_blocks_and_processes_change_nothing(name):
    step = random_step(records=9)
    wanted = objective_of({name: 1.0}, matryoshka_dims=[4, DIM])
    whole = gradients(step, wanted)
    assert whole.queries.any(dim=1).all()
    for cut in ({"sizes": [2, 4, 3]}, {"sizes": [9, 0]}, {"block_elements": 1}):
        found = gradients(step, wanted, **cut)
        for mine, other in zip(found[:3], whole[:3], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=2e-6 * float(other.abs().max()))
