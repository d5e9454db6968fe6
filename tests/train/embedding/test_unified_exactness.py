"""A step of several representations is the same however it is cut, and that of a plain loop (tests/plain_unified.py).
The engines are in test_exactness.py."""

from pathlib import Path

import pytest
import torch
from plain_unified import plain_unified
from training_runs import read_metrics, train
from unified_runs import FACTORS, KINDS, STEP, TOLERANCES, all_weights, assert_same, outcome, settings

CUTS = {
    "kept": {},
    "recomputed": {"max_tokens_with_graph": 0},
    "accumulated, cut and half kept": {
        "batch_size": 4, "gradient_accumulation_steps": 4, "max_tokens_per_batch": 100, "max_tokens_with_graph": 300,
    },
    "padded": {"max_tokens_per_batch": 300, "attn_implementation": "sdpa"},
}  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bert) -> dict[str, dict]:
    folder = tmp_path_factory.mktemp("unified")
    return {kind: keys | {"output_dir": str(folder / kind)} for kind, keys in settings(folder, bert).items()}


@pytest.fixture(scope="module")
def kept(runs) -> dict:
    found = {}
    for kind, values in runs.items():
        train(values)
        found[kind] = outcome(values)
    return found


def test_unified_training_is_that_of_a_plain_loop(runs, kept):
    losses, weights = plain_unified(runs["unified"], STEP, FACTORS, taught_from=1)
    assert {"sparse_linear.weight", "colbert_linear.bias"} <= weights.keys()
    assert_same(kept["unified"], (losses, weights), TOLERANCES["unified"])


CASES = [(kind, cut) for kind in KINDS for cut in ("recomputed", "accumulated, cut and half kept")]


@pytest.mark.parametrize(("kind", "cut"), [*CASES, ("unified", "padded")])
def test_a_step_is_the_same_however_it_is_cut(runs, kept, kind, cut, tmp_path):
    values = runs[kind] | CUTS[cut] | {"output_dir": str(tmp_path / "run")}
    train(values)
    assert_same(outcome(values), kept[kind], TOLERANCES[kind])


def test_every_head_learns(runs, kept):
    before = all_weights(Path(runs["unified"]["model_name_or_path"]).parent)
    changed = [name for name in before if not torch.equal(before[name], kept["unified"][1][name])]
    assert {"sparse_linear.weight", "sparse_linear.bias", "colbert_linear.weight", "colbert_linear.bias"} < {*changed}


# ---- what the runs leave


def test_each_representation_and_their_ensemble_are_measured_and_any_may_choose_the_model(runs, kept):
    folder = Path(runs["unified"]["output_dir"])
    first, last = read_metrics(folder, "eval")
    for name in ("ndcg@10", "dense/ndcg@10", "lexical/mrr@10", "multi_vector/recall@100", "mean_cosine", "loss"):
        assert name in first and name in last
    assert first["ndcg@10"] != first["lexical/ndcg@10"] and first["loss"] != last["loss"]
    assert (folder / "checkpoint-3").is_dir(), "the best by lexical/ndcg@10"


def test_the_log_has_the_loss_of_each_representation_and_the_number_of_terms(runs, kept):
    lines = {kind: read_metrics(Path(values["output_dir"]), "train") for kind, values in runs.items()}
    losses = {"dense/loss", "lexical/loss", "multi_vector/loss", "ensemble/loss"}
    assert losses | {"positive_rank", "lexical/positive_rank"} <= lines["unified"][0].keys()
    assert lines["splade"][0]["document_terms"] > 0 and lines["splade"][0]["query_terms"] > 0
    assert "multi_vector/positive_rank" in lines["colbert"][0]


def test_the_card_says_how_each_kind_is_used_and_what_else_opens_it(runs, kept):
    texts = {kind: (Path(values["output_dir"]) / "model/README.md").read_text() for kind, values in runs.items()}
    says = {"unified": "BGEM3FlagModel", "splade": "SparseEncoder", "colbert": "models.ColBERT"}
    for kind, text in texts.items():
        assert [name for name in says.values() if name in text] == [says[kind]]
    assert "outputs=['dense', 'lexical', 'multi_vector']" in texts["unified"] and "pooling mean" in texts["unified"]
    assert "lexical weights by splade" in texts["splade"] and "pooling mean" not in texts["splade"]
    assert "at most 48 tokens per text and 8 per query" in texts["colbert"] and "query: [Q] " in texts["colbert"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_and_resumed_runs_give_the_same_bits_with_dropout(runs, kind, tmp_path, bert_with_dropout):
    """The checkpoint is in the ramp of FLOPS regularization, before self-distillation begins."""
    whole = runs[kind] | {"model_name_or_path": bert_with_dropout, "max_tokens_per_batch": 100, "save_steps": 1}
    whole |= {"num_max_checkpoints": 9, "output_dir": str(tmp_path / "whole")}
    train(whole)
    expected = outcome(whole)[1]
    checkpoint = str(tmp_path / "whole" / "checkpoint-1")
    for name, changes in (("graphs", {"max_tokens_with_graph": 0}), ("resumed", {"resume": checkpoint})):
        values = whole | changes | {"output_dir": str(tmp_path / name)}
        train(values)
        found = outcome(values)[1]
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[weight]) for weight, value in found.items()), name
