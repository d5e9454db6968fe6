"""InfoNCE of a whole step: against plain loops, sentence-transformers, and itself cut differently."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from sentence_transformers.sentence_transformer.losses import (
    CachedMultipleNegativesRankingLoss,
    GISTEmbedLoss,
    MatryoshkaLoss,
    MultipleNegativesRankingLoss,
)
from step_samples import DIM, LargestTensor, gradients, random_step, step_records, vector_gradients

from rag_retrieval.losses.embedding import objective_of
from rag_retrieval.losses.step_targets import targets_of

DIRECTIONS = ("query_to_doc", "query_to_query", "doc_to_query", "doc_to_doc")


def objective(widths=None, weights=None, **options):
    return objective_of({"info_nce": 1.0}, options, widths, weights)


def plain_info_nce(queries, documents, step, temperature=0.02, directions=("query_to_doc",), **options):
    """[records], by loops over records and candidates, by id."""
    records = step.records
    query_of = {int(key): row for row, key in enumerate(step.query_ids)}
    document_of = {int(key): column for column, key in enumerate(step.document_ids)}
    known = {}
    for i in range(len(records.query_ids)):
        mine = known.setdefault(int(records.query_ids[i]), {int(records.positive_ids[i])})
        mine |= set(map(int, records.known_positive_ids[2 * i : 2 * i + 2]))
    cosine = lambda a, b: F.cosine_similarity(a, b, dim=0)  # noqa: E731
    losses = []
    for i in range(len(records.query_ids)):
        query_id, positive_id = int(records.query_ids[i]), int(records.positive_ids[i])
        start, end = records.negative_offsets[i : i + 2]
        hard = set(map(int, records.negative_ids[start:end])) - {positive_id}
        query, positive = queries[query_of[query_id]], documents[document_of[positive_id]]
        terms = []
        for document_id, column in document_of.items():
            is_positive, other = document_id == positive_id, document_id in known[query_id]
            in_batch = options.get("use_inbatch_neg", True)
            if is_positive or (not other and (in_batch or document_id in hard)):
                score = cosine(query, documents[column])
                logit = score / temperature
                weighted = {"hard_negatives": document_id in hard, "in_batch_negatives": document_id not in hard}
                if is_positive:
                    logit = logit - options.get("margin", 0.0) / temperature
                elif weighted.get(options.get("hardness_mode"), True):
                    logit = logit + options.get("hardness_strength", 0.0) * score.detach()
                terms.append(logit)
            if "doc_to_doc" in directions and not (is_positive or other or document_id in hard):
                terms.append(cosine(positive, documents[column]) / temperature)
        for other_id, row in query_of.items():
            if positive_id in known[other_id] and other_id != query_id:
                continue
            if "query_to_query" in directions and other_id != query_id:
                terms.append(cosine(query, queries[row]) / temperature)
            if "doc_to_query" in directions:
                terms.append(cosine(positive, queries[row]) / temperature)
        pair = (cosine(query, positive) - options.get("margin", 0.0)) / temperature
        losses.append(torch.stack(terms).logsumexp(dim=0) - pair)
    return torch.stack(losses)


def plain_gradients(step, widths=((DIM, 1.0),), factor=1.0, **options):
    queries, documents = (each.double().requires_grad_() for each in (step.queries, step.documents))
    losses = sum(
        weight * plain_info_nce(queries[:, :width], documents[:, :width], step, **options) for width, weight in widths
    )
    return losses.detach(), *torch.autograd.grad(factor * losses.sum(), [queries, documents])


def assert_equal(found, expected):
    for mine, other in zip(found, expected, strict=False):
        torch.testing.assert_close(mine.double(), other, rtol=1e-5, atol=1e-5 * float(other.abs().max()))


def one_pair_step(*cosines: float):
    """A record whose positive has the first cosine, and one negative for each of the others."""
    documents = torch.tensor([[c, math.sqrt(1 - c * c)] for c in cosines]) * 3.0
    ids = np.arange(len(cosines), dtype=np.uint64)
    records = step_records(ids[:1], ids[:1], [ids[1:]])
    return torch.tensor([[2.0, 0.0]]), documents, targets_of(ids[:1], ids, [records])


def test_value_and_gradient_by_hand():
    queries, documents, targets = one_pair_step(0.6, 0.8)
    found = vector_gradients(objective(temperature=0.5), queries, documents, targets, factor=2.0)
    # log(e^1.2 + e^1.6) - 1.2
    assert found.losses.tolist() == pytest.approx([math.log(math.exp(1.2) + math.exp(1.6)) - 1.2])
    share = 1 / (1 + math.exp(-0.4))  # of the negative
    # d loss / d cosine is -share / .5 at the positive; its cosine changes by .8 * (.8, -.6) / 3 at (.6, .8) * 3
    expected = -2 * share / 0.5 * torch.tensor([0.64, -0.48]) / 3
    torch.testing.assert_close(found.documents[0], expected)
    # at the query (2, 0) the cosine with (a, b) changes by (0, b) / 2
    torch.testing.assert_close(found.queries[0], torch.tensor([0.0, 2 * share / 0.5 * (0.6 - 0.8) / 2]))


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"temperature": 0.1, "directions": DIRECTIONS},
        {"temperature": 0.1, "directions": ("query_to_doc", "doc_to_query")},
        {"temperature": 0.1, "use_inbatch_neg": False},
        {"temperature": 0.1, "margin": 0.2},
        {"temperature": 0.1, "margin": 0.2, "use_inbatch_neg": False},
        *(
            {"temperature": 0.1, "hardness_mode": mode, "hardness_strength": 9.0}
            for mode in ("in_batch_negatives", "hard_negatives", "all_negatives")
        ),
    ],
    ids=str,
)
def test_losses_and_gradients_are_those_of_plain_loops(options):
    step = random_step()
    assert_equal(gradients(step, objective(**options), factor=0.5), plain_gradients(step, factor=0.5, **options))


@pytest.mark.parametrize("options", [{"directions": DIRECTIONS, "hardness_strength": 5.0}, {"use_inbatch_neg": False}])
def test_blocks_and_processes_change_nothing(options):
    step = random_step(records=9)
    wanted = objective(widths=(4, 8, DIM), temperature=0.1, **options)
    whole = gradients(step, wanted)
    assert whole.queries.any(dim=1).all()
    for cut in ({"sizes": [2, 4, 3]}, {"sizes": [0, 9]}, {"block_elements": 1}, {"block_elements": 200}):
        found = gradients(step, wanted, **cut)
        for mine, other in zip(found[:3], whole[:3], strict=True):
            torch.testing.assert_close(mine, other, rtol=1e-6, atol=2e-6 * float(other.abs().max()))
        assert found.report == pytest.approx(whole.report, rel=1e-5)


@pytest.mark.parametrize("widths", [{DIM: 1.0, 3: 0.25, 6: 0.5}, {6: 1.0, 3: 0.5}])
def test_matryoshka_slices_then_normalizes_and_weights(widths):
    step = random_step()
    wanted = objective(widths=tuple(widths), weights=tuple(widths.values()), temperature=0.1)
    expected = plain_gradients(step, widths=widths.items(), temperature=0.1)
    assert_equal(gradients(step, wanted), expected)


def test_widths_beyond_the_model_are_cut_to_it():
    assert objective(widths=(768, 512, 4), weights=(1.0, 2.0, 3.0)).widths_of(12) == ((4, 12), (3.0, 1.0))
    assert objective().widths_of(12) == ((12,), (1.0,))


def test_without_weights_the_loss_is_the_mean_over_the_widths_that_the_model_has():
    assert objective(widths=(4, 8, 16, 32)).widths_of(12) == ((4, 8, 12), (1 / 3, 1 / 3, 1 / 3))


def test_autocast_and_no_grad_of_the_caller_change_nothing():
    step = random_step()
    expected = gradients(step, objective(temperature=0.1))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        found = gradients(step, objective(temperature=0.1))
    assert all(torch.equal(mine, other) for mine, other in zip(found[:3], expected[:3], strict=True))


def test_a_vector_of_zeros_has_a_finite_gradient():
    queries, documents, targets = one_pair_step(0.6, 0.8)
    found = vector_gradients(objective(widths=(1, 2)), queries * 0, documents, targets, factor=1.0)
    assert all(torch.isfinite(each).all() for each in found[:3])


# ---- false negatives ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("margin", "margin_type", "kept"),
    [
        (0.1, "absolute", [0.6, 0.65, -0.2]),
        (0.04, "absolute", [0.6, -0.2]),
        (0.1, "relative", [0.6, 0.65, -0.2]),  # above .66
        (-0.9, "relative", [0.6, -0.2]),  # above .06
        (-2.0, "absolute", [0.6]),  # the positive stays, whatever the margin
    ],
)
@pytest.mark.parametrize("use_inbatch_neg", [True, False])
def test_documents_above_the_positive_by_the_margin_are_left_out(margin, margin_type, kept, use_inbatch_neg):
    queries, documents, targets = one_pair_step(0.6, 0.65, 0.8, -0.2)
    wanted = objective(
        temperature=0.5, use_inbatch_neg=use_inbatch_neg, false_negative_margin=margin,
        false_negative_margin_type=margin_type,
    )  # fmt: skip
    found = vector_gradients(wanted, queries, documents, targets, factor=1.0)
    expected = math.log(sum(math.exp(cosine / 0.5) for cosine in kept)) - 1.2
    assert found.losses.tolist() == pytest.approx([expected], abs=1e-6)
    assert found.report["dense/masked"] == 4 - len(kept)


@pytest.mark.parametrize("use_inbatch_neg", [True, False])
def test_a_teacher_judges_the_records_own_negatives(use_inbatch_neg):
    queries, documents, _ = one_pair_step(0.6, 0.65, 0.8, -0.2)
    ids = np.arange(4, dtype=np.uint64)
    records = step_records(ids[:1], ids[:1], [ids[1:3]], positive_scores=[3.0], negative_scores=[3.5, 9.0])
    wanted = objective(
        temperature=0.5, use_inbatch_neg=use_inbatch_neg, false_negative_margin=1.0, false_negative_judge="teacher"
    )
    found = vector_gradients(wanted, queries, documents, targets_of(ids[:1], ids, [records]), factor=1.0)
    kept = [0.6, 0.65, -0.2] if use_inbatch_neg else [0.6, 0.65]  # the last document is nobody's negative
    assert found.losses.tolist() == pytest.approx([math.log(sum(math.exp(c / 0.5) for c in kept)) - 1.2], abs=1e-6)
    assert wanted.reads == {"positives", "teacher_score"}


@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize("strategy", ["absolute", "relative"])
@pytest.mark.parametrize("negatives", [0, 1])
def test_value_and_gradient_of_sentence_transformers_gist_loss(margin, strategy, negatives):
    columns, targets = tuples(records=6, negatives=negatives)
    guides, _ = tuples(records=6, negatives=negatives, seed=9)
    leaves = [column.clone().requires_grad_() for column in columns]
    theirs = GISTEmbedLoss.__new__(GISTEmbedLoss)  # without the tokenizers of two models
    torch.nn.Module.__init__(theirs)
    vars(theirs).update(
        model=GivenVectors(), guide=GivenVectors("guide"), temperature=0.1, margin=margin, margin_strategy=strategy,
        contrast_anchors=True, contrast_positives=not negatives, gather_across_devices=False, must_retokenize=False,
        similarity_fct=torch.nn.CosineSimilarity(dim=-1), cross_entropy_loss=torch.nn.CrossEntropyLoss(),
    )  # fmt: skip
    expected = theirs([{"vectors": leaf, "guide": guide} for leaf, guide in zip(leaves, guides, strict=True)], None)
    directions = ("query_to_doc", "query_to_query", *(() if negatives else ("doc_to_doc",)))
    wanted = objective(
        temperature=0.1, directions=directions, false_negative_margin=-margin, false_negative_margin_type=strategy,
        false_negative_judge="guide",
    )  # fmt: skip
    found = vector_gradients(
        wanted, columns[0], torch.cat(columns[1:]), targets, factor=1 / 6, guide=(guides[0], torch.cat(guides[1:]))
    )
    torch.testing.assert_close(found.losses.mean(), expected.detach())
    torch.testing.assert_close(found.queries, torch.autograd.grad(expected, leaves[0])[0], rtol=1e-4, atol=1e-6)
    assert wanted.reads == {"positives", "guide"}


def test_qwen3_form_by_loops():
    columns, targets = tuples(records=4, negatives=2)
    queries, positives, *hard = (F.normalize(column, dim=1) for column in columns)
    losses, left_out = [], 0
    for i in range(4):
        pair = queries[i] @ positives[i]
        others = [column[j] for column in (positives, *hard) for j in range(4) if j != i]
        scores = [queries[i] @ column[i] for column in hard] + [queries[i] @ other for other in others]
        scores += [queries[i] @ queries[j] for j in range(4) if j != i] + [positives[i] @ other for other in others]
        kept = [score for score in scores if score <= pair + 0.1]
        left_out += len(scores) - len(kept)
        losses.append(torch.stack([pair, *kept]).div(0.3).logsumexp(0) - pair / 0.3)
    wanted = objective_of({"qwen3_info_nce": 1.0}, {"temperature": 0.3})
    found = vector_gradients(wanted, columns[0], torch.cat(columns[1:]), targets, factor=1.0)
    torch.testing.assert_close(found.losses, torch.stack(losses))
    assert left_out > 4


# ---- sentence-transformers ---------------------------------------------------------------------------------


def tuples(records: int, negatives: int, seed=3):
    """A step without shared texts, and its columns as sentence-transformers has them: queries, positives, negatives."""
    generator = torch.Generator().manual_seed(seed)
    columns = [torch.randn(records, DIM, generator=generator) for _ in range(2 + negatives)]
    ids = np.arange(records * (1 + negatives), dtype=np.uint64)
    own = step_records(ids[:records], ids[:records], ids[records:].reshape(negatives, records).T)
    return columns, targets_of(ids[:records], ids, [own])


class GivenVectors(torch.nn.Module):
    """A model whose embedding of a column is the column."""

    def __init__(self, name="vectors"):
        super().__init__()
        self.name = name

    def forward(self, features):
        return {"sentence_embedding": features[self.name]}

    def get_embedding_dimension(self):
        return DIM


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ({"temperature": 0.05}, {}),
        ({"temperature": 0.1, "directions": DIRECTIONS}, {"scale": 10.0, "directions": DIRECTIONS}),
        *(
            [{"temperature": 0.1, "hardness_mode": mode, "hardness_strength": 5.0},
             {"scale": 10.0, "hardness_mode": mode, "hardness_strength": 5.0}]
            for mode in ("in_batch_negatives", "hard_negatives", "all_negatives")
        ),
    ],
    ids=str,
)  # fmt: skip
def test_value_and_gradient_of_sentence_transformers_ranking_loss(ours, theirs):
    columns, targets = tuples(records=6, negatives=2)
    leaves = [column.clone().requires_grad_() for column in columns]
    expected = MultipleNegativesRankingLoss(None, **theirs).compute_loss_from_embeddings(leaves, None)
    grads = torch.autograd.grad(expected, leaves)
    cached = CachedMultipleNegativesRankingLoss([torch.nn.Identity()], mini_batch_size=2, **theirs)
    in_mini_batches = cached.calculate_loss([column.split(2) for column in columns])
    found = vector_gradients(objective(**ours), columns[0], torch.cat(columns[1:]), targets, factor=1 / 6)
    torch.testing.assert_close(found.losses.mean(), expected.detach())
    torch.testing.assert_close(found.losses.mean(), in_mini_batches)
    torch.testing.assert_close(found.queries, grads[0], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.documents, torch.cat(grads[1:]), rtol=1e-4, atol=1e-6)


def test_value_of_sentence_transformers_matryoshka_loss():
    columns, targets = tuples(records=5, negatives=1)
    model = GivenVectors()
    theirs = MatryoshkaLoss(model, MultipleNegativesRankingLoss(model), [DIM, 6, 3], [1.0, 0.5, 0.3])
    expected = theirs([{"vectors": column} for column in columns], None)
    wanted = objective(widths=(DIM, 6, 3), weights=(1.0, 0.5, 0.3), temperature=0.05)
    found = vector_gradients(wanted, columns[0], torch.cat(columns[1:]), targets, factor=1.0)
    torch.testing.assert_close(found.losses.mean(), expected)


# ---- memory and report -------------------------------------------------------------------------------------


def test_no_matrix_of_all_queries_and_documents_exists():
    records, documents = 512, 2048
    ids = np.arange(documents, dtype=np.uint64)
    targets = targets_of(ids[:records], ids, [step_records(ids[:records], ids[:records])])
    vectors = torch.randn(documents, DIM)
    with LargestTensor() as largest:
        vector_gradients(objective(), vectors[:records], vectors, targets, factor=1.0, block_elements=1 << 15)
    assert largest.values == 1 << 15  # not 2^20; the vectors themselves are fewer


@pytest.mark.parametrize("widths", [None, (1, 2)])
def test_report_counts_rank_cosines_and_masked_documents_at_the_full_width(widths):
    queries, documents, targets = one_pair_step(0.6, 0.8, 0.5, 0.0)
    found = vector_gradients(objective(widths, temperature=0.5), queries, documents, targets, factor=1.0)
    assert found.report == pytest.approx(
        {"records": 1, "near_zero": 0, "dense/loss": float(found.losses), "dense/positive_rank": 2,
         "dense/positive_score": 0.6, "dense/negative_score": 1.3, "dense/negatives": 3, "dense/masked": 0}, abs=1e-6,
    )  # fmt: skip


def test_report_of_several_losses_is_that_of_the_first():
    step = random_step()
    alone = gradients(step, objective(temperature=0.1)).report
    both = gradients(step, objective_of({"info_nce": 1.0, "kl_distillation": 1.0}, {"temperature": 0.1})).report
    assert both == alone | {name: both[name] for name in ("near_zero", "dense/loss")}
