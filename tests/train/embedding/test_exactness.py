"""A step of an embedder is the same however it is cut, and that of a plain loop (tests/plain_embedding.py)."""

from pathlib import Path

import pytest
import torch
from plain_embedding import plain_training
from training_runs import embedding_records, final_weights, read_metrics, train, write_jsonl

# 5 steps: warmup of round(0.4 * 5) = 2, constant to round(0.6 * 5) = 3, then half a cosine over 2
SCHEDULE = {"warmup_proportion": 0.4, "stable_proportion": 0.2}
FACTORS = [0.5, 1.0, 1.0, 1.0, 0.5]
STEP = 32
CUTS = {
    "kept": {},
    "recomputed": {"max_tokens_with_graph": 0},
    "accumulated": {"batch_size": 8, "gradient_accumulation_steps": 4},
    "cut": {"max_tokens_per_batch": 100},
    "cut and recomputed": {"max_tokens_per_batch": 100, "max_tokens_with_graph": 0},
    "cut and half kept": {"max_tokens_per_batch": 100, "max_tokens_with_graph": 600},
    "padded": {"max_tokens_per_batch": 300, "attn_implementation": "sdpa"},
    "checkpointed": {"gradient_checkpointing": True},
}


@pytest.fixture(scope="module")
def values(tmp_path_factory, bert) -> dict:
    folder = tmp_path_factory.mktemp("exactness")
    return SCHEDULE | {
        "task": "embedding",
        "model_name_or_path": bert,
        "query_max_len": 24,
        "passage_max_len": 48,
        "train_dataset": write_jsonl(folder / "train.jsonl", embedding_records(5 * STEP)),
        "loss_type": "info_nce",
        "temperature": 0.05,
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


@pytest.fixture(scope="module")
def plain(values):
    return plain_training(values, STEP, FACTORS)


def outcome(values: dict) -> tuple[list[float], dict[str, torch.Tensor]]:
    losses = [line["loss"] for line in read_metrics(Path(values["output_dir"]), "train")]
    return losses, final_weights(values["output_dir"])


def assert_same(found, expected, tolerance: float) -> None:
    """Relatively; weights below 0.1 count as that large: those of a bias are sums of gradients, with their rounding."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for name, value in found[1].items():
        torch.testing.assert_close(value, expected[1][name], rtol=tolerance, atol=0.1 * tolerance)


@pytest.fixture(scope="module")
def kept(values):
    train(values)
    return outcome(values)


@pytest.mark.parametrize("cut", CUTS)
def test_five_steps_equal_a_plain_loop_however_they_are_cut(values, plain, kept, cut):
    train(values | CUTS[cut])
    found = outcome(values)
    assert_same(found, plain, 1e-5)
    assert_same(found, kept, 1e-6)
