"""The loss of several representations and their ensemble, self-distillation and FLOPS, against plain loops."""

import math
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
from step_samples import random_step

from rag_retrieval.losses.embedding import Flops, SelfDistillation, objective_of
from rag_retrieval.losses.step_targets import targets_of
from rag_retrieval.losses.step_weights import StepWeights, flops
from rag_retrieval.losses.unified import unified

ALL = ("dense", "lexical", "multi_vector")
TEMPERATURE = 0.5
INFO_NCE = objective_of({"info_nce": 1.0}, {"temperature": TEMPERATURE})


def slow_losses(step, slow, distilled=False):
    """[records], with the weights of BGE-M3's trainer written out."""
    dense, lexical, tokens = (slow.scores(name) for name in ALL)
    ensemble = dense + 0.3 * lexical + tokens
    loss = {
        name: slow_info_nce(step, scores, TEMPERATURE)
        for name, scores in (("d", dense), ("s", lexical), ("m", tokens), ("e", ensemble))
    }
    total = (loss["d"] + 0.1 * loss["s"] + loss["m"] + loss["e"]) / 4
    if not distilled:
        return total
    teacher = (ensemble.detach() / TEMPERATURE).softmax(dim=1)
    rows = [step.query_ids.tolist().index(query) for query in step.records.query_ids.tolist()]
    distance = [
        torch.stack([(teacher[row] * (teacher[row] / (scores[row] / TEMPERATURE).softmax(dim=0)).log()).sum()
                     for row in rows])
        for scores in (dense, lexical, tokens)
    ]  # fmt: skip
    return (total + (distance[0] + 0.1 * distance[1] + distance[2]) / 3) / 2


@pytest.fixture(scope="module")
def step():
    return random_step(records=6)


def test_the_loss_of_all_representations_is_that_of_loops(step):
    outputs = random_outputs(step)
    slow = Slow(outputs, mean=True)
    found = gradients_of(step, outputs, unified(INFO_NCE, ALL, multi_vector_mean=True), factor=0.25)
    assert_same(tensors(found), slow_gradients(slow, slow_losses(step, slow), factor=0.25))
    assert found.report["ensemble/loss"] > 0 and found.report["lexical/negatives"] == found.report["dense/negatives"]


@pytest.mark.parametrize(("start", "done", "distilled"), [(-1, 0, True), (3, 3, False), (3, 4, True)])
def test_the_ensemble_teaches_each_once_more_than_start_step_steps_are_done(step, start, done, distilled):
    outputs = random_outputs(step)
    slow = Slow(outputs)
    taught = SelfDistillation({}, start_step=start, temperature=TEMPERATURE)
    found = gradients_of(step, outputs, unified(INFO_NCE, ALL, self_distillation=taught), step=done)
    assert_same(tensors(found), slow_gradients(slow, slow_losses(step, slow, distilled)))


def test_self_distillation_without_in_batch_negatives_is_over_the_own_documents(step):
    outputs = random_outputs(step, ("dense", "lexical"))
    taught = SelfDistillation({"dense": 1.0, "lexical": 0.0}, -1, TEMPERATURE, use_inbatch_neg=False)
    nothing_else = objective_of({"info_nce": 0.0})
    wanted = unified(nothing_else, ("dense", "lexical"), None, {"lexical": 2.0}, taught)
    slow = Slow(outputs)
    dense, lexical = slow.scores("dense"), slow.scores("lexical")
    targets = targets_of(step.query_ids, step.document_ids, [step.records])
    losses = []
    for row, own in zip(targets.queries, torch.cat([targets.positives[:, None], targets.negatives], 1), strict=True):
        own = own[own >= 0]
        student, teacher = (dense[row, own] / TEMPERATURE, (dense + 2 * lexical)[row, own].detach() / TEMPERATURE)
        losses.append((teacher.softmax(0) * (teacher.log_softmax(0) - student.log_softmax(0))).sum())
    expected = slow_gradients(slow, torch.stack(losses) / 2)
    assert_same(tensors(gradients_of(step, outputs, wanted)), expected)


@pytest.mark.parametrize("options", [{"directions": ("query_to_doc", "doc_to_query")}, {"use_inbatch_neg": False}])
def test_blocks_and_processes_change_nothing(step, options):
    outputs = random_outputs(step)
    taught = SelfDistillation({}, temperature=TEMPERATURE, use_inbatch_neg=options.get("use_inbatch_neg", True))
    terms = objective_of({"info_nce": 1.0, "kl_distillation": 0.5}, {"temperature": TEMPERATURE, **options}, [4, 12])
    wanted = unified(terms, ALL, self_distillation=taught, flops=Flops(0.3, 0.2))
    whole = gradients_of(step, outputs, wanted)
    for cut in ({"sizes": [2, 1, 3]}, {"sizes": [0, 6]}, {"block_elements": 1}, {"block_elements": 300}):
        found = gradients_of(step, outputs, wanted, **cut)
        assert_same(tensors(found), tensors(whole), tolerance=5e-6)
        assert found.report == pytest.approx(whole.report, rel=1e-5)


def test_matryoshka_is_of_dense_vectors_and_the_ensemble_has_the_whole_vector(step):
    outputs = random_outputs(step, ("dense", "lexical"))
    terms = objective_of({"info_nce": 1.0}, {"temperature": TEMPERATURE}, [3, 12], [0.25, 1.0])
    slow = Slow(outputs)
    cut = Slow(tuple(replace(each, dense=each.dense[:, :3]) for each in outputs))
    cut.leaves = {**slow.leaves, **{name: leaf[:, :3] for name, leaf in slow.leaves.items() if "dense" in name}}
    dense, lexical = slow.scores("dense"), slow.scores("lexical")
    loss = lambda scores: slow_info_nce(step, scores, TEMPERATURE)  # noqa: E731
    total = loss(dense) + 0.25 * loss(cut.scores("dense")) + 0.1 * loss(lexical) + loss(dense + 0.3 * lexical)
    found = gradients_of(step, outputs, unified(terms, ("dense", "lexical")))
    assert_same(tensors(found), slow_gradients(slow, total / 3))


def test_a_rerankers_scores_teach_every_representation(step):
    outputs = random_outputs(step, ("lexical", "multi_vector"))
    wanted = unified(objective_of({"kl_distillation": 1.0}, {"temperature": TEMPERATURE}), ("lexical", "multi_vector"))
    slow = Slow(outputs)
    lexical, tokens = slow.scores("lexical"), slow.scores("multi_vector")
    targets = targets_of(step.query_ids, step.document_ids, [step.records])
    losses = []
    for i, row in enumerate(targets.queries):
        own = torch.cat([targets.positives[i : i + 1], targets.negatives[i]])
        teacher = targets.teacher_scores[i].double()[own >= 0].softmax(0)
        for weight, scores in ((0.1, lexical), (1.0, tokens), (1.0, 0.3 * lexical + tokens)):
            student = (scores[row, own[own >= 0]] / TEMPERATURE).log_softmax(0)
            losses.append(weight / 3 * (teacher * (teacher.log() - student)).sum())
    expected = slow_gradients(slow, torch.stack(losses).view(-1, 3).sum(dim=1))
    assert_same(tensors(gradients_of(step, outputs, wanted)), expected)


def test_graded_pairs_are_ordered_by_every_score(step):
    outputs = random_outputs(step, ("dense", "lexical"))
    wanted = unified(objective_of({"cosent": 1.0}, {"temperature": TEMPERATURE}), ("dense", "lexical"))
    slow = Slow(outputs)
    dense, lexical = slow.scores("dense"), slow.scores("lexical")
    targets = targets_of(step.query_ids, step.document_ids, [step.records])
    total = 0.0
    for weight, scores in ((1.0, dense), (0.1, lexical), (1.0, dense + 0.3 * lexical)):
        pairs = scores[targets.queries, targets.positives] / TEMPERATURE
        below = targets.labels[:, None] > targets.labels
        total = total + weight / 3 * (pairs - pairs[:, None])[below].exp().sum().log1p()
    count = len(targets.queries)  # each record has the value of all
    expected = slow_gradients(slow, total.expand(count))
    assert_same(tensors(gradients_of(step, outputs, wanted)), expected)


def test_one_representation_alone_has_its_whole_loss_and_no_ensemble(step):
    wanted = unified(INFO_NCE, ["lexical"])
    assert (dict(wanted.loss_weights), wanted.self_distillation) == ({"lexical": 1.0}, None)
    found = gradients_of(step, random_outputs(step, ["lexical"]), wanted)
    assert found.report["lexical/loss"] == pytest.approx(float(found.losses.sum()))


def test_losses_are_divided_by_the_number_of_those_with_a_weight():
    taught = SelfDistillation({"lexical": 0.0})
    wanted = unified(INFO_NCE, ALL, {"ensemble": 0.0, "dense": 2.0}, {"lexical": 0.5}, taught)
    assert wanted.loss_weights == {"dense": 2 / 3, "lexical": 0.1 / 3, "multi_vector": 1 / 3, "ensemble": 0.0}
    assert wanted.ensemble_weights == {"dense": 1.0, "lexical": 0.5, "multi_vector": 1.0}
    assert wanted.self_distillation.weights == {"dense": 0.5, "lexical": 0.0, "multi_vector": 0.5}


@pytest.mark.parametrize(
    ("objective", "arguments", "named"),
    [
        (objective_of({"stella": 1.0}), (ALL,), "teacher.*dense vectors alone.*lexical"),
        (INFO_NCE, (["dense"], None, None, SelfDistillation({})), "self-distillation.*two"),
        (INFO_NCE, (["dense"], None, None, None, Flops(1.0, 1.0)), "FLOPS.*lexical"),
        (INFO_NCE, (ALL, {"sparse": 1.0}), "sparse.*dense, lexical, multi_vector, ensemble"),
        (INFO_NCE, (["dense", "lexical"], None, {"multi_vector": 1.0}), "multi_vector.*dense, lexical"),
        (INFO_NCE, (ALL, dict.fromkeys([*ALL, "ensemble"], 0.0)), "weight above 0"),
    ],
)
def test_mistakes_are_named(objective, arguments, named):
    with pytest.raises(ValueError, match=named):
        unified(objective, *arguments)


# ---- FLOPS -------------------------------------------------------------------------------------------------


def texts(*rows):
    """Of each text its weights by id."""
    ids = torch.tensor([key for row in rows for key in row], dtype=torch.int64)
    weights = torch.tensor([weight for row in rows for weight in row.values()])
    return StepWeights(ids, weights, torch.tensor([len(row) for row in rows]))


def test_flops_are_squares_of_mean_weights_over_all_texts():
    queries, documents = texts({1: 2.0, 7: 1.0}, {7: 3.0}), texts({1: 4.0}, {}, {}, {1: 4.0, 9: 2.0})
    # queries: (2/2)^2 + (4/2)^2; documents: (8/4)^2 + (2/4)^2
    value = flops(Flops(0.1, 0.01), queries, documents, step=0)
    assert value.item() == pytest.approx(0.1 * 5 + 0.01 * 4.25)
    value.backward()
    assert queries.gradient().tolist() == pytest.approx([0.1 * 2 * 1 / 2, 0.1 * 2 * 2 / 2, 0.1 * 2 * 2 / 2])
    assert documents.gradient().tolist() == pytest.approx([0.01 * 2 * 2 / 4] * 2 + [0.01 * 2 * 0.5 / 4])


@pytest.mark.parametrize(("step", "share"), [(0, 0.0), (5, 0.25), (10, 1.0), (12, 1.0)])
def test_the_weight_of_flops_grows_quadratically(step, share):
    value = flops(Flops(1.0, 0.0, ramp_steps=10), texts({3: 2.0}), texts({3: 1.0}), step)
    assert value.item() == pytest.approx(4 * share)


def test_flops_are_a_term_of_every_record_and_terms_are_counted(step):
    outputs = random_outputs(step, ["lexical"])
    slow = Slow(outputs)
    losses = slow_info_nce(step, slow.scores("lexical"), TEMPERATURE)
    for side, weight in (("queries", 0.3), ("documents", 0.2)):
        ids, _, counts = outputs[side == "documents"].lexical
        sums = torch.zeros(100, dtype=torch.float64).index_add(0, ids, slow.leaves[f"{side}.lexical"])
        losses = losses + weight * (sums / len(counts)).square().sum()
    found = gradients_of(step, outputs, unified(INFO_NCE, ["lexical"], flops=Flops(0.3, 0.2)), [2, 4], factor=1 / 6)
    assert_same(tensors(found), slow_gradients(slow, losses, factor=1 / 6))
    live = [int((each.lexical[1] > 0).sum()) / len(each.lexical[2]) for each in outputs]
    report = found.report
    assert report["query_terms"] / report["query_texts"] == pytest.approx(live[0])
    assert report["document_terms"] / report["document_texts"] == pytest.approx(live[1])
    assert math.isclose(report["query_texts"], len(outputs[0].lexical[2]), rel_tol=1e-6)
