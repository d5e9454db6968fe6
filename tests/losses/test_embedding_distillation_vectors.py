"""Stella's three losses against plain loops, and over processes."""

import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from step_samples import DIM, step_records, vector_gradients

from rag_retrieval.losses.embedding import objective_of
from rag_retrieval.losses.embedding_distillation import discordant
from rag_retrieval.losses.step_targets import targets_of


def texts(records=7, width=DIM, seed=0):
    generator = torch.Generator().manual_seed(seed)
    student, teacher = torch.randn(records, DIM, generator=generator), torch.randn(records, width, generator=generator)
    ids = np.arange(records, dtype=np.uint64)
    return student, teacher, ids


def found(wanted, student, teacher, ids, sizes=None, **options):
    """Losses of all records and gradients, added over processes with these numbers of records."""
    ends = np.cumsum(sizes or [len(ids)])
    parts = [slice(end - size, end) for size, end in zip(sizes or [len(ids)], ends, strict=True)]
    records = [step_records(ids[part], ids[part], teacher_vectors=teacher[part].numpy()) for part in parts]
    done = [
        vector_gradients(
            wanted, student, student[:0], targets_of(ids, ids[:0], records, process), 1 / len(ids), **options
        )
        for process in range(len(parts))
    ]
    return torch.cat([each.losses for each in done]), sum(each.queries for each in done)


def plain_stella(student, teacher, weights=(10.0, 200.0, 20.0), widths=(DIM,), margin=0.015):
    """As RAG-Retrieval's trainer has it, by loops."""
    teacher = F.normalize(teacher, dim=1)
    wanted = teacher @ teacher.T
    records = range(len(student))
    total = weights[0] * sum(1 - F.normalize(student[i], dim=0) @ teacher[i] for i in records) / len(student)
    for width in widths:
        vectors = F.normalize(student[:, :width], dim=1)
        similarities = vectors @ vectors.T
        total = total + weights[1] * (similarities - wanted).square().mean() / len(widths)
        hinges = []
        for a, b in itertools.combinations(itertools.combinations(records, 2), 2):
            sign = 1.0 if wanted[b] < wanted[a] else -1.0
            hinges.append((sign * (similarities[b] - similarities[a]) + margin).clamp(min=0))
        total = total + weights[2] * torch.stack(hinges).mean() / len(widths)
    return total


@pytest.mark.parametrize("widths", [(DIM,), (3, 6, DIM), (3, 6)])
def test_stella_is_the_plain_sum_of_its_losses(widths):
    student, teacher, ids = texts()
    leaf = student.clone().requires_grad_()
    expected = plain_stella(leaf, teacher, widths=widths)
    wanted = objective_of({"stella": 1.0}, {}, widths, [1 / len(widths)] * len(widths))
    losses, gradient = found(wanted, student, teacher, ids)
    torch.testing.assert_close(losses.mean(), expected.detach())
    torch.testing.assert_close(gradient, torch.autograd.grad(expected, leaf)[0], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["teacher_cosine", "teacher_similarity", "teacher_triplet"])
def test_blocks_and_processes_change_nothing(name):
    student, teacher, ids = texts()
    wanted = objective_of({name: 1.0}, matryoshka_dims=[4, DIM])
    whole = found(wanted, student, teacher, ids)
    for cut in ({"sizes": [2, 5]}, {"sizes": [0, 7]}, {"block_elements": 1}):
        for mine, other in zip(found(wanted, student, teacher, ids, **cut), whole, strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=2e-6 * float(other.abs().max()))


def test_similarities_are_learnt_from_a_teacher_of_any_width_but_not_its_vectors():
    student, teacher, ids = texts(width=5)
    found(objective_of({"teacher_similarity": 1.0, "teacher_triplet": 1.0}), student, teacher, ids)
    with pytest.raises(ValueError, match="12.*5.*projection"):
        found(objective_of({"stella": 1.0}), student, teacher, ids)


@pytest.mark.parametrize("number", [0, 1, 2, 5, 16, 21])
def test_discordant_pairs_are_counted(number):
    # whole numbers: a difference of just the margin is not discordant
    values = torch.randint(0, 6, (number,), generator=torch.Generator().manual_seed(number)).float()
    above, below = discordant(values, margin=1.0)
    assert above.tolist() == [sum(bool(values[i] + 1 > later) for later in values[i + 1 :]) for i in range(number)]
    assert below.tolist() == [sum(bool(earlier > values[i] - 1) for earlier in values[:i]) for i in range(number)]


def test_two_texts_have_no_triplet():
    student, teacher, ids = texts(records=2)
    losses, gradient = found(objective_of({"teacher_triplet": 1.0}), student, teacher, ids)
    assert losses.tolist() == [0.0, 0.0]
    assert not gradient.any()
