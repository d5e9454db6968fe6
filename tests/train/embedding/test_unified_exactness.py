"""A step of several representations is the same however it is cut, and that of a plain loop (tests/plain_unified.py).
The engines are in test_exactness.py."""

from pathlib import Path

import pytest
import torch
from plain_unified import plain_unified
from safetensors.torch import load_file
from training_runs import embedding_records, final_weights, read_metrics, train, write_jsonl

from rag_retrieval.models.embedder import EmbeddingModel

# 3 steps: warmup of round(0.4 * 3) = 1, then half a cosine over 2
SCHEDULE = {"warmup_proportion": 0.4, "stable_proportion": 0.0}
FACTORS = [1.0, 1.0, 0.5]
STEP = 16
CUTS = {
    "kept": {},
    "recomputed": {"max_tokens_with_graph": 0},
    "accumulated, cut and half kept": {
        "batch_size": 4, "gradient_accumulation_steps": 4, "max_tokens_per_batch": 100, "max_tokens_with_graph": 300,
    },
    "padded": {"max_tokens_per_batch": 300, "attn_implementation": "sdpa"},
}  # fmt: skip
KINDS = {
    "unified": {
        "representations": ["dense", "lexical", "multi_vector"], "use_self_distill": True,
        "self_distill_start_step": 0, "temperature": 0.05,
    },
    "splade": {
        "representations": "lexical", "lexical_method": "splade", "lambda_query": 0.1, "lambda_document": 0.2,
        "flops_ramp_steps": 2,
    },
    "colbert": {"representations": "multi_vector", "colbert_dim": 16, "query_max_len": 8},
}  # fmt: skip


def with_heads(bert: str, folder: Path) -> str:
    """A folder in bge-m3's layout whose heads are random numbers of a size that matters."""
    model = EmbeddingModel.from_pretrained(bert, representations=["dense", "lexical", "multi_vector"], colbert_dim=16)
    generator = torch.Generator().manual_seed(0)
    for each in model.token_heads.parameters():
        torch.nn.init.normal_(each, std=0.3, generator=generator)
    folder.mkdir(parents=True)
    model.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def runs(tmp_path_factory, bert) -> dict[str, dict]:
    """The configuration of each kind."""
    folder = tmp_path_factory.mktemp("unified")
    shared = SCHEDULE | {
        "task": "embedding",
        "model_name_or_path": bert,
        "query_max_len": 24,
        "passage_max_len": 48,
        "train_dataset": write_jsonl(folder / "train.jsonl", embedding_records(3 * STEP)),
        "output_dir": str(folder / "run"),
        "overwrite_output_dir": True,
        "batch_size": STEP,
        "lr": 1e-3,
        "adam_epsilon": 1e-3,  # Adam divides rounding noise by itself where a gradient is zero: key biases
        "max_grad_norm": 0.5,
        "num_workers": 0,
        "log_interval": 1,
        "save_on_epoch_end": False,
    }
    heads = {"model_name_or_path": with_heads(bert, folder / "m3" / "model")}
    return {kind: shared | keys | (heads if kind == "unified" else {}) for kind, keys in KINDS.items()}


def all_weights(output_dir: str) -> dict[str, torch.Tensor]:
    """Those of the model and of its heads."""
    folder, weights = Path(output_dir) / "model", final_weights(output_dir)
    for file in folder.glob("*_linear.pt"):
        found = torch.load(file, weights_only=True)
        weights |= {f"{file.stem}.{name}": value for name, value in found.items()}
    for file in folder.glob("*/model.safetensors"):
        weights |= {f"{file.parent.name}.{name}": value for name, value in load_file(file).items()}
    return weights


def outcome(values: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = [line["loss"] for line in read_metrics(Path(values["output_dir"]), "train")]
    return losses, all_weights(values["output_dir"])


def assert_same(found, expected, tolerance: float) -> None:
    """Relatively; weights below 0.1 count as that large."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    assert found[1].keys() >= expected[1].keys()
    for name, value in expected[1].items():
        torch.testing.assert_close(found[1][name], value, rtol=tolerance, atol=0.1 * tolerance)


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
    assert_same(kept["unified"], (losses, weights), 1e-5)


CASES = [(kind, cut) for kind in KINDS for cut in ("recomputed", "accumulated, cut and half kept")]


@pytest.mark.parametrize(("kind", "cut"), [*CASES, ("unified", "padded")])
def test_a_step_is_the_same_however_it_is_cut(runs, kept, kind, cut):
    train(runs[kind] | CUTS[cut])
    assert_same(outcome(runs[kind]), kept[kind], 2e-6)


def test_every_head_learns(runs, kept):
    before = all_weights(Path(runs["unified"]["model_name_or_path"]).parent)
    changed = [name for name in before if not torch.equal(before[name], kept["unified"][1][name])]
    assert {"sparse_linear.weight", "sparse_linear.bias", "colbert_linear.weight", "colbert_linear.bias"} < {*changed}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_recomputed_and_resumed_runs_give_the_same_bits_with_dropout(runs, kind, tmp_path, bert_with_dropout):
    """The checkpoint is in the ramp of FLOPS regularization, before self-distillation begins."""
    whole = runs[kind] | {"model_name_or_path": bert_with_dropout, "max_tokens_per_batch": 100, "save_steps": 1}
    whole |= {"num_max_checkpoints": 9, "output_dir": str(tmp_path / "whole"), "overwrite_output_dir": False}
    train(whole)
    expected = outcome(whole)[1]
    checkpoint = str(tmp_path / "whole" / "checkpoint-1")
    for name, changes in (("graphs", {"max_tokens_with_graph": 0}), ("resumed", {"resume": checkpoint})):
        values = whole | changes | {"output_dir": str(tmp_path / name)}
        train(values)
        found = outcome(values)[1]
        assert found.keys() == expected.keys()
        assert all(torch.equal(value, expected[weight]) for weight, value in found.items()), name
