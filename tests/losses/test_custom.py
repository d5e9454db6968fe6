"""A user's own loss by its path: what is accepted, and what each check refuses."""

import sys
import textwrap
from pathlib import Path

import pytest
import torch

from rag_retrieval.losses import LOSSES
from rag_retrieval.losses.custom import loss_named

GOOD = """
    import torch
    def grouped_hinge(scores, labels, mask):
        pairs = (labels[:, :, None] < labels[:, None, :]) & mask[:, :, None] & mask[:, None, :]
        margins = (1 + scores[:, :, None] - scores[:, None, :]).clamp(min=0)
        return margins.masked_fill(~pairs, 0.0).sum(), pairs.sum()
    def pairs_l1(scores, labels, mask):
        return (scores.sigmoid() - labels).abs().masked_fill(~mask, 0.0).sum(), int(mask.sum())
    def of_teacher(scores, teacher_scores, mask, power=2):
        errors = (scores - teacher_scores).abs() ** power
        return errors.masked_fill(~mask, 0.0).sum(), mask.sum()
"""
TERMS = "(scores - labels).square()"
BAD = {  # name of a function: its code, and what the error must name
    "two_arguments(scores, labels)": ("return scores.sum(), 1", "scores, labels, mask"),
    "one_more(scores, labels, mask, margin)": ("return scores.sum(), 1", "margin"),
    "a_scalar(scores, labels, mask)": ("return scores.sum()", "sum and a count"),
    "no_scalar(scores, labels, mask)": ("return scores * mask, mask.sum()", "scalar"),
    "detached(scores, labels, mask)": ("return (scores * mask).sum().detach(), mask.sum()", "depends on the scores"),
    "other_graph(scores, labels, mask)": ("return torch.ones(1, requires_grad=True).sum(), mask.sum()", "not depend"),
    "not_finite(scores, labels, mask)": ("return (scores * mask).sum() / 0, mask.sum()", "finite"),
    "raises(scores, labels, mask)": ("raise KeyError('key')", "KeyError"),
    "a_mean(scores, labels, mask)": (f"return ({TERMS} * mask).sum() / mask.sum().clamp(min=1), mask.sum()", "mean"),
    "reads_padding(scores, labels, mask)": (f"return {TERMS}.sum(), mask.sum()", "mask is False"),
    "counts_padding(scores, labels, mask)": (f"return ({TERMS} * mask).sum(), mask.numel()", "padding"),
    "half_counts(scores, labels, mask)": (f"return ({TERMS} * mask).sum(), mask.sum() / 2.3", "whole number"),
    "counts_scores(scores, labels, mask)": (f"return ({TERMS} * mask).sum(), (scores[mask] > 1).sum() + 1", "count"),
    "counts_none(scores, labels, mask)": (f"return ({TERMS} * mask).sum(), 0", "count 0"),
}


@pytest.fixture
def own(tmp_path, monkeypatch):
    """A module `own_losses` in the current folder, which is not on sys.path."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.path", [entry for entry in sys.path if entry])
    bad = "".join(f"def {name}:\n    {code}\n" for name, (code, _) in BAD.items())
    (tmp_path / "own_losses.py").write_text(textwrap.dedent(GOOD) + bad)
    yield "own_losses"
    sys.modules.pop("own_losses", None)


def test_a_user_function_is_imported_by_its_path(own):
    loss = loss_named(f"{own}:grouped_hinge", "grouped")
    assert (loss.name, loss.dataset_type, loss.reads) == (f"{own}:grouped_hinge", "grouped", "label")
    total, count = loss(torch.tensor([[0.0, 0.5, 9.0]]), torch.tensor([[1.0, 0.0, 0.0]]), torch.tensor([[1, 1, 0]]) > 0)
    assert (total.item(), int(count)) == (1.5, 1)
    assert loss.count(torch.tensor([[1.0, 0.0, 0.0]])) == 2
    assert loss.constant_score_loss(torch.tensor([[1.0, 0.0, 0.0]])) == 1.0
    assert loss_named(f"{own}:pairs_l1", "pointwise").count(torch.zeros(3), torch.tensor([True, True, False])) == 2


def test_a_second_parameter_teacher_scores_reads_those(own):
    assert loss_named(f"{own}:of_teacher", "grouped").reads == "teacher_score"


def test_each_fault_of_an_own_function_is_refused_with_its_name(own):
    for name, (_, word) in BAD.items():
        path = f"{own}:{name.partition('(')[0]}"
        with pytest.raises(ValueError) as error:
            loss_named(path, "grouped")
        assert path in str(error.value) and word in str(error.value), error.value


def test_what_is_no_loss_at_all_is_refused(own):
    Path("broken_losses.py").write_text("def loss(:\n")
    of_module = [f"{own}:{name}" for name in ("no_such_function", "torch", "")]
    for path in ("no_such_module:loss", "broken_losses:loss", *of_module, "a b:c", ":f", "listwise"):
        with pytest.raises(ValueError, match="loss_type"):
            loss_named(path, "grouped")


def test_the_shipped_losses_pass_the_same_checks():
    for loss in LOSSES.values():
        assert loss_named(loss.path, loss.dataset_type).path == loss.path
        assert all(loss_named(name, loss.dataset_type) is loss for name in (loss.name, *loss.aliases))
