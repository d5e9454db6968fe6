"""Our losses against those of sentence-transformers on the same scores, and where their reductions differ, how.

Theirs score texts with a model; here the "model" looks the score of a document up by its text.
"""

import math
from functools import partial

import pytest
import torch
from loss_values import reduced

from rag_retrieval import losses
from rag_retrieval.losses import LOSSES

theirs = pytest.importorskip("sentence_transformers.cross_encoder.losses")
CrossEncoder = pytest.importorskip("sentence_transformers.cross_encoder").CrossEncoder

adr_mse = reduced(losses.adr_mse)
info_nce = reduced(losses.info_nce)
lambda_loss = reduced(losses.lambda_loss)
listmle = reduced(losses.listmle)
listnet = reduced(losses.listnet)
listwise_ce = reduced(losses.listwise_ce)
margin_mse = reduced(losses.margin_mse)
position_listmle = reduced(losses.position_listmle)
ranknet = reduced(losses.ranknet)
count_graded_documents = LOSSES["adr_mse"].count

generator = torch.Generator().manual_seed(11)
SCORES = 2 * torch.randn(3, 6, generator=generator)
DISTINCT = torch.stack([torch.randperm(6, generator=generator) for _ in range(3)]).float()
GRADES = torch.tensor([[3.0, 0, 1, 0, 0, 2], [0, 1, 0, 0, 0, 0], [0, 2, 2, 1, 0, 0]])
SIZES = [6, 4, 5]
MASK = torch.arange(6) < torch.tensor(SIZES)[:, None]


class Looked(CrossEncoder):
    """A cross-encoder whose document "g:i" has the score scores[g, i]."""

    num_labels, device = 1, torch.device("cpu")

    def __init__(self, scores: torch.Tensor):
        torch.nn.Module.__init__(self)
        self.given = scores

    def preprocess(self, pairs, **_):
        return {"places": torch.tensor([[int(part) for part in text.split(":")] for _, text in pairs])}

    def forward(self, features):
        return {"scores": self.given[tuple(features["places"].T)].unsqueeze(1)}


def value_and_gradient(function) -> tuple[float, torch.Tensor]:
    leaf = SCORES.clone().requires_grad_()
    value = function(leaf)
    value.backward()
    return value.item(), leaf.grad


def of_groups(loss, labels: torch.Tensor, **options) -> tuple[float, torch.Tensor]:
    """Their listwise loss: groups without padding, [documents] labels each."""
    texts = [[f"{group}:{place}" for place in range(size)] for group, size in enumerate(SIZES)]
    rows = [row[:size] for row, size in zip(labels, SIZES, strict=True)]
    return value_and_gradient(lambda scores: loss(Looked(scores), **options)([["q"] * 3, texts], rows))


def ours(function, labels: torch.Tensor, **options) -> tuple[float, torch.Tensor]:
    return value_and_gradient(lambda scores: function(scores, labels, MASK, **options))


def same(first: tuple[float, torch.Tensor], second: tuple[float, torch.Tensor], factor: float = 1.0) -> None:
    assert first[0] == pytest.approx(factor * second[0], rel=1e-5)
    torch.testing.assert_close(first[1], factor * second[1], rtol=1e-4, atol=1e-6)


def test_listnet_is_theirs():
    same(ours(listnet, GRADES), of_groups(theirs.ListNetLoss, GRADES))


def test_listnet_leaves_out_groups_of_equal_labels_unlike_theirs():
    labels = GRADES.clone()
    labels[1] = 0.0
    value, grad = of_groups(theirs.ListNetLoss, labels)
    equal = -torch.log_softmax(SCORES[1, :4], dim=0).mean().item()
    assert 2 * ours(listnet, labels)[0] == pytest.approx(3 * value - equal, rel=1e-5)
    assert (ours(listnet, labels)[1][1] == 0).all() and (grad[1, :4] != 0).all()


@pytest.mark.parametrize(("function", "name"), [(listmle, "ListMLELoss"), (position_listmle, "PListMLELoss")])
def test_listmle_of_labels_that_all_differ_is_theirs(function, name):
    loss = partial(getattr(theirs, name), respect_input_order=False)
    same(ours(function, DISTINCT), of_groups(loss, DISTINCT))


def test_listmle_of_equal_labels_ignores_the_file_order_unlike_theirs():
    loss = partial(theirs.ListMLELoss, respect_input_order=False)
    labels = torch.tensor([[1.0, 0, 0, 0, 0, 0]] * 3)
    places = torch.tensor([0, 3, 1, 2, 4, 5])  # moves documents of the lowest label alone
    moved, before = SCORES[:, places], SCORES
    texts = [[f"{group}:{place}" for place in range(6)] for group in range(3)]
    rows = [loss(Looked(scores))([["q"] * 3, texts], list(labels)).item() for scores in (before, moved)]
    assert rows[0] != pytest.approx(rows[1], rel=1e-3)
    assert listmle(before, labels).item() == pytest.approx(listmle(moved, labels).item(), rel=1e-6)
    assert listmle(before, labels).item() == pytest.approx(listwise_ce(before, labels).item(), rel=1e-6)


@pytest.mark.parametrize("top_k", [None, 1, 2, 3])
@pytest.mark.parametrize(
    ("weights", "scheme"), [("ndcg_loss2pp", "NDCGLoss2PPScheme"), ("lambdarank", "LambdaRankScheme")]
)
def test_lambda_loss_is_theirs_but_for_the_divisor(weights, scheme, top_k):
    """Theirs divides by the pairs that are left of the top k, ours by the groups."""
    loss = partial(theirs.LambdaLoss, weighting_scheme=getattr(theirs, scheme)(), k=top_k)
    left = 0
    for scores, labels, size in zip(SCORES.tolist(), GRADES.tolist(), SIZES, strict=True):
        ranked = sorted(range(size), key=lambda place, scores=scores: -scores[place])
        left += sum(
            labels[a] != labels[b]
            for rank, a in enumerate(ranked)
            for b in ranked[rank + 1 :]
            if top_k is None or rank < top_k
        )
    same(ours(lambda_loss, GRADES, lambda_weights=weights, lambda_top_k=top_k), of_groups(loss, GRADES), left / 3)


def test_adr_mse_is_theirs_but_for_groups_with_equal_labels():
    same(ours(adr_mse, GRADES), of_groups(theirs.ADRMSELoss, GRADES))
    labels = GRADES.clone()
    labels[1] = 0.0
    assert count_graded_documents(labels, MASK) == 11
    approximate = 0.5 + (SCORES[1, None, :4] - SCORES[1, :4, None]).sigmoid().sum(1)
    equal = ((2.5 - approximate) ** 2).sum().item() / math.log2(3.5)
    there = of_groups(theirs.ADRMSELoss, labels)[0] * 15
    assert 11 * ours(adr_mse, labels)[0] == pytest.approx(there - equal, rel=1e-5)


def test_ranknet_is_theirs_where_labels_differ_by_one():
    """But for the logarithm: theirs is to the base 2."""
    labels = torch.tensor([[1.0, 0, 0, 1, 0, 0]] * 3)
    same(ours(ranknet, labels), of_groups(theirs.RankNetLoss, labels), math.log(2.0))


def their_columns(loss, scores, labels=None, groups=range(3)):
    """Their loss over columns: queries, positives, and each further document of the group as a negative."""
    columns = [[f"{group}:{place}" for group in groups] for place in range(6)]
    return loss(Looked(scores))([["q"] * len(groups), *columns], labels)


def test_info_nce_is_their_ranking_loss_without_in_batch_negatives():
    labels = torch.tensor([[1.0, 0, 0, 0, 0, 0]] * 3)
    loss = partial(theirs.MultipleNegativesRankingLoss, scale=2.0, activation_fn=torch.nn.Identity())
    same(
        value_and_gradient(lambda scores: info_nce(scores, labels, temperature=0.5)),
        # one query at a time: a batch of one has no other document in it
        value_and_gradient(lambda scores: sum(their_columns(loss, scores, groups=[group]) for group in range(3)) / 3),
    )


def test_margin_mse_of_triples_is_theirs_and_groups_add_their_other_pairs():
    teacher = 3 * torch.randn(3, 6, generator=torch.Generator().manual_seed(2))
    expected = value_and_gradient(lambda scores: their_columns(theirs.MarginMSELoss, scores, teacher))

    def triples(scores):
        pairs = [
            torch.stack([table[:, :1].expand(3, 5), table[:, 1:]], dim=2).flatten(0, 1) for table in (scores, teacher)
        ]
        return margin_mse(*pairs)

    same(value_and_gradient(triples), expected)
    errors = SCORES - teacher
    others = sum((errors[:, i] - errors[:, j]) ** 2 for i in range(1, 6) for j in range(1, i)).sum().item()
    assert margin_mse(SCORES, teacher, reduction="sum").item() == pytest.approx(15 * expected[0] + others, rel=1e-5)
