"""Distillation from reranker scores: by hand, against sentence-transformers and FlagEmbedding, over processes."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import DistillKLDivLoss, MarginMSELoss
from step_samples import DIM, gradients, random_step, step_records, vector_gradients

from rag_retrieval.losses.embedding import objective_of
from rag_retrieval.losses.step_targets import targets_of

LOSSES = ("margin_mse", "kl_distillation", "m3_distillation")


def groups(records=5, negatives=3, seed=0):
    """Columns (queries, positives, negatives ...), teacher scores [records, 1 + negatives], and targets."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randn(records, DIM, generator=generator) for _ in range(2 + negatives)]
    scores = 2 * torch.randn(records, 1 + negatives, generator=generator)
    ids = np.arange(records * (1 + negatives), dtype=np.uint64)
    own = step_records(
        ids[:records], ids[:records], ids[records:].reshape(negatives, records).T,
        positive_scores=scores[:, 0].numpy(), negative_scores=scores[:, 1:].flatten().numpy(),
    )  # fmt: skip
    return columns, scores, targets_of(ids[:records], ids, [own])


def found(name, columns, targets, factor=1.0, normalize=True, **options):
    wanted = objective_of({name: 1.0}, options, normalize=normalize)
    return vector_gradients(wanted, columns[0], torch.cat(columns[1:]), targets, factor)


def uneven(cosines, teacher):
    """One record whose documents have these cosines with the query, and a second one without negatives."""
    ids = np.arange(len(cosines) + 1, dtype=np.uint64)
    records = step_records(
        ids[:2], [ids[0], ids[-1]], [ids[1:-1], []], positive_scores=[teacher[0], 7.0], negative_scores=teacher[1:]
    )
    documents = torch.tensor([[c, math.sqrt(1 - c * c)] for c in [*cosines, 0.9]])
    return [torch.tensor([[1.0, 0.0], [1.0, 0.0]]), documents], targets_of(ids[:2], ids, [records])


def test_margin_mse_by_hand():
    columns, targets = uneven([0.5, 0.3, 0.6], [2.0, 1.0, 0.0])
    # margins .2 and -.1, over .1: 2 and -1; the teacher's 1 and 2
    values = found("margin_mse", columns, targets, temperature=0.1).losses
    assert values.tolist() == pytest.approx([(1 + 9) / 2, 0.0], abs=1e-5)


def test_kl_by_hand():
    columns, targets = uneven([0.5, 0.3], [0.0, math.log(3) * 2])
    student = 1 / (1 + math.exp(-2))  # of the positive, at temperature .1
    values = found("kl_distillation", columns, targets, temperature=0.1, teacher_temperature=2.0).losses
    expected = 0.25 * math.log(0.25 / student) + 0.75 * math.log(0.75 / (1 - student))
    assert values.tolist() == pytest.approx([expected, 0.0], abs=1e-5)


def test_value_and_gradient_of_sentence_transformers_margin_mse():
    columns, scores, targets = groups()
    leaves = [column.clone().requires_grad_() for column in columns]
    expected = MarginMSELoss(None).compute_loss_from_embeddings(leaves, scores)
    mine = found("margin_mse", columns, targets, factor=1 / 5, normalize=False, temperature=1.0)
    torch.testing.assert_close(mine.losses.mean(), expected.detach())
    torch.testing.assert_close(mine.queries, torch.autograd.grad(expected, leaves[0])[0], rtol=1e-4, atol=1e-5)


def test_value_and_gradient_of_sentence_transformers_kl():
    columns, scores, targets = groups()
    leaves = [column.clone().requires_grad_() for column in columns]
    theirs = DistillKLDivLoss(None, similarity_fct=lambda a, b: F.cosine_similarity(a, b, dim=-1), temperature=2.0)
    expected = theirs.compute_loss_from_embeddings(leaves, scores) / 2.0**2
    mine = found("kl_distillation", columns, targets, factor=1 / 5, temperature=2.0, teacher_temperature=2.0)
    torch.testing.assert_close(mine.losses.mean(), expected.detach())
    torch.testing.assert_close(mine.queries, torch.autograd.grad(expected, leaves[0])[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("use_inbatch_neg", [True, False])
def test_m3_is_flag_embeddings_sum_of_cross_entropies(use_inbatch_neg):
    columns, scores, targets = groups()
    records, candidates = scores.shape
    leaves = [column.clone().requires_grad_() for column in columns]
    queries, *documents = (F.normalize(leaf, dim=1) for leaf in leaves)
    logits = queries @ torch.cat(documents).T / 0.1
    expected = 0.0
    for i in range(records):
        columns_of = [c * records + i for c in range(candidates)]
        for c in range(candidates):
            terms = [
                logits[i, column]
                for column in range(records * candidates)
                if column not in columns_of[:c] and (use_inbatch_neg or column in columns_of)
            ]
            entropy = torch.stack(terms).logsumexp(0) - logits[i, columns_of[c]]
            expected = expected + scores[i].softmax(0)[c] * entropy / records
    mine = found("m3_distillation", columns, targets, 1 / 5, temperature=0.1, use_inbatch_neg=use_inbatch_neg)
    torch.testing.assert_close(mine.losses.mean(), expected.detach())
    grads = torch.autograd.grad(expected, leaves)
    torch.testing.assert_close(mine.queries, grads[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(mine.documents, torch.cat(grads[1:]), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_blocks_and_processes_change_nothing(name):
    step = random_step(records=9)
    wanted = objective_of({name: 1.0, "info_nce": 0.5}, {"temperature": 0.1}, matryoshka_dims=[4, DIM])
    whole = gradients(step, wanted)
    assert whole.queries.any(dim=1).all()
    for cut in ({"sizes": [2, 4, 3]}, {"sizes": [9, 0]}, {"block_elements": 1}):
        mine = gradients(step, wanted, **cut)
        for one, other in zip(mine[:3], whole[:3], strict=True):
            torch.testing.assert_close(one, other, rtol=1e-6, atol=2e-6 * float(other.abs().max()))


@pytest.mark.parametrize("name", LOSSES)
def test_scores_of_the_teacher_up_to_a_constant_give_the_same_loss(name):
    columns, scores, targets = groups()
    values = found(name, columns, targets).losses
    shifted = vars(targets) | {"teacher_scores": targets.teacher_scores + 3.0}
    torch.testing.assert_close(found(name, columns, type(targets)(**shifted)).losses, values, rtol=1e-4, atol=1e-4)
