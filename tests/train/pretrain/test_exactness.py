"""A step of pre-training is the same however it is cut and on any engine, and that of a plain loop
(tests/plain_pretraining.py). All cases of an engine run in one launch.
"""

import json
from pathlib import Path

import pytest
import torch
from plain_pretraining import plain_pretraining
from training_runs import engine_command, final_weights, launch, read_metrics, train

STEP, PROCESSES = 8, 2
# 5 steps: warmup of round(0.4 * 5) = 2, constant to round(0.6 * 5) = 3, then half a cosine over 2
SCHEDULE = {"warmup_proportion": 0.4, "stable_proportion": 0.2}
FACTORS = [0.5, 1.0, 1.0, 1.0, 0.5]
KINDS = {
    "retromae": {"loss_type": "retromae", "bag_of_words_weight": 0.5},
    "span_pairs": {"loss_type": "span_pairs", "pooling": "mean"},
}
CUTS = {
    "whole": {},
    "accumulated": {"batch_size": 2, "gradient_accumulation_steps": 4},
    "cut": {"max_tokens_per_batch": 60},
    "padded": {"attn_implementation": "sdpa"},
    "checkpointed": {"gradient_checkpointing": True},
}
LAUNCH_FILES = ("ddp", "default_fsdp", "deepspeed/deepspeed_zero3")


@pytest.fixture(scope="module")
def values(settings) -> dict:
    return settings(**SCHEDULE)


@pytest.fixture(scope="module")
def plain(values):
    """Of each kind of loss, made when it is asked for."""
    made = {}

    def of(kind: str):
        if kind not in made:
            made[kind] = plain_pretraining(values | KINDS[kind], STEP, FACTORS)
        return made[kind]

    return of


def outcome(output_dir: str | Path) -> tuple[list[float], dict[str, torch.Tensor]]:
    return [line["loss"] for line in read_metrics(Path(output_dir), "train")], final_weights(output_dir)


def assert_same(found, expected, tolerance: float = 1e-5) -> None:
    """Relatively; weights below 0.1 count as that large: those of a bias are sums of gradients, with their rounding."""
    assert found[0] == pytest.approx(expected[0], rel=tolerance)
    for name, value in found[1].items():
        torch.testing.assert_close(value, expected[1][name], rtol=tolerance, atol=0.1 * tolerance)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("cut", CUTS)
def test_five_steps_equal_a_plain_loop_however_they_are_cut(values, plain, kind, cut):
    train(values | KINDS[kind] | CUTS[cut])
    assert_same(outcome(values["output_dir"]), plain(kind))


@pytest.mark.parametrize("kind", KINDS)
def test_half_precision_computes_about_the_same_losses(values, plain, kind):
    train(values | KINDS[kind] | {"mixed_precision": "bf16"})
    losses, weights = outcome(values["output_dir"])
    assert losses == pytest.approx(plain(kind)[0], rel=1e-2) and losses != plain(kind)[0]
    assert {value.dtype for value in weights.values()} == {torch.float32}


# --- engines, with two processes ---


@pytest.fixture(scope="module")
def cases(values, bert_with_dropout, modernbert) -> dict[str, dict]:
    """The configuration of each case, but for its output folder."""
    on_two = values | {"batch_size": STEP // PROCESSES, "overwrite_output_dir": False}
    dropout = {"model_name_or_path": bert_with_dropout, "save_steps": 2, "num_max_checkpoints": 9}
    runs = {"modernbert": on_two | KINDS["retromae"] | {"model_name_or_path": modernbert}}
    for kind, keys in KINDS.items():
        runs[kind] = on_two | keys
        runs[f"{kind} cut"] = on_two | keys | {"max_tokens_per_batch": 40}
        runs[f"{kind} dropout"] = on_two | keys | dropout
    return runs


@pytest.fixture(scope="module", params=LAUNCH_FILES)
def outputs(request, cases, tmp_path_factory) -> Path:
    """A folder with the finished run of each case, under its name."""
    if "deepspeed" in request.param:
        pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("engine")
    runs = {case: keys | {"output_dir": str(folder / case)} for case, keys in cases.items()}
    for kind in KINDS:
        resume = {"output_dir": str(folder / f"{kind} resumed"),
                  "resume": str(folder / f"{kind} dropout" / "checkpoint-2")}  # fmt: skip
        runs[f"{kind} resumed"] = runs[f"{kind} dropout"] | resume
    (folder / "cases.json").write_text(json.dumps(runs))
    command = engine_command(f"config/{request.param}.yaml", PROCESSES, "tests/engine_runs.py")
    done = launch([*command, str(folder / "cases.json")])
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_of_every_engine_take_the_same_steps(outputs, plain, kind):
    for case in (kind, f"{kind} cut"):
        assert_same(outcome(outputs / case), plain(kind))


@pytest.mark.slow
def test_every_engine_trains_a_family_whose_embeddings_it_would_shard_alone(outputs, values, modernbert):
    train(values | KINDS["retromae"] | {"model_name_or_path": modernbert})
    assert_same(outcome(outputs / "modernbert"), outcome(values["output_dir"]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_engine_resumes_to_the_same_bits(outputs, kind):
    found, expected = (final_weights(outputs / f"{kind} {case}") for case in ("resumed", "dropout"))
    assert all(torch.equal(value, expected[name]) for name, value in found.items())
