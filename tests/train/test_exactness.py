"""Every engine, with two processes, takes the steps of a plain float32 loop (tests/plain_training.py).

All cases of an engine run in one launch, made by the first test that asks for it.
"""

import json
from functools import cache
from pathlib import Path

import pytest
import torch
from plain_training import plain_training
from training_runs import (
    engine_command,
    final_weights,
    grouped_records,
    launch,
    pointwise_records,
    read_metrics,
    train,
    with_teacher_scores,
    write_jsonl,
)
from yes_no_samples import YES_NO, tiny_causal

from rag_retrieval.data.sampling import epoch_order
from rag_retrieval.models.layerwise import WEIGHT

pytestmark = pytest.mark.slow

LAUNCH_FILES = ["ddp", "default_fsdp", *(f"deepspeed/deepspeed_zero{stage}" for stage in range(4))]
# the last is a mix of two losses whose divisors differ, one of which has nothing to count in some steps
LOSSES = ["point_ce", "point_mse", "pairwise_ranknet", "listwise_ce", "pairwise_ranknet+margin_mse"]
# encoder and decoder take turns: neither the loss nor the accumulation knows which model gave the scores
MODELS = [("bert", "qwen2"), ("qwen2", "bert")]
CASES = [
    f"{loss}-{accumulation}-{model}"
    for place, loss in enumerate(LOSSES) for accumulation, model in zip((1, 3), MODELS[place % 2], strict=True)
]  # fmt: skip
PROCESSES = 2
# 5 steps: warmup of round(0.4 * 5) = 2, constant to round(0.6 * 5) = 3, then half a cosine over 2
SCHEDULE = {"warmup_proportion": 0.4, "stable_proportion": 0.2}
FACTORS = [0.5, 1.0, 1.0, 1.0, 0.5]
STEP_WITHOUT_PAIRS, STEP_WITHOUT_PAIRS_ON_ONE = 2, 1
MIXED_STEP = 12  # records of a step of the case with two files


def step_size(loss: str, accumulation: int) -> int:
    """Records of a step over all processes."""
    return (4 if loss.startswith("point") else 2) * accumulation * PROCESSES


def record_count(loss: str, accumulation: int) -> int:
    """Four whole steps and a last one, of which the second process has less, and with accumulation nothing."""
    return 4 * step_size(loss, accumulation) + (1 if accumulation > 1 else step_size(loss, 1) // PROCESSES + 1)


def records_of(loss: str, accumulation: int) -> list[dict]:
    count = record_count(loss, accumulation)
    if loss.startswith("point"):
        return pointwise_records(count, labels=(0, 0.25, 1))
    if loss == "listwise_ce":
        return grouped_records(count)
    records, size = with_teacher_scores(grouped_records(count, levels=(0, 1, 2))), step_size(loss, accumulation)
    order = epoch_order(42, 0, count)
    alone = order[STEP_WITHOUT_PAIRS_ON_ONE * size : (STEP_WITHOUT_PAIRS_ON_ONE + 1) * size][1::PROCESSES]
    whole = order[STEP_WITHOUT_PAIRS * size : (STEP_WITHOUT_PAIRS + 1) * size]
    for place in [*alone, *whole]:
        records[place]["hits"] = [hit | {"label": 0} for hit in records[place]["hits"]]
    return records


def step_keys(loss: str, accumulation: int) -> dict:
    """The keys of a case that takes the plain loop's steps, but for its model and files."""
    loss, _, teacher_loss = loss.partition("+")
    teacher = {"teacher_loss_type": teacher_loss, "teacher_weight": 0.3} if teacher_loss else {}
    return (
        SCHEDULE
        | teacher
        | {
            "max_len": 48,
            "train_dataset_type": "pointwise" if loss.startswith("point") else "grouped",
            "loss_type": loss,
            "batch_size": step_size(loss, 1) // PROCESSES,
            "gradient_accumulation_steps": accumulation,
            # cuts the batches of the processes into different numbers of micro-batches
            "max_tokens_per_batch": 96 if accumulation > 1 else None,
            "max_grad_norm": None if loss == "point_mse" else 0.5,
            "lr": 1e-3,
            "adam_epsilon": 1e-3,  # Adam divides rounding noise by itself where a gradient is zero: key biases
            "num_workers": 0,
            "log_interval": 1,
            "save_on_epoch_end": False,
        }
    )


def mixed_keys(base: dict, folder: Path) -> dict:
    """Three steps of groups, of which the last has one record alone, and between them two of pairs."""
    groups = write_jsonl(folder / "groups.jsonl", grouped_records(2 * MIXED_STEP + 1))
    pairs = write_jsonl(folder / "pairs.jsonl", pointwise_records(MIXED_STEP + 5, labels=(0, 0.25, 1)))
    entries = [groups, {"path": pairs, "type": "pointwise", "loss_type": "point_ce"}]
    return base | {"train_dataset": entries}


def further_keys(
    cases: dict[str, dict], validation: dict[int, str], with_dropout: str, causal: dict[str, str]
) -> dict[str, dict]:
    """Cases beside those of the plain loop, by name."""
    base = cases["listwise_ce-3-bert"]
    lora = {"lora_r": 4, "lora_target_modules": "all-linear", "gradient_checkpointing": True}
    whole = base | {"model_name_or_path": with_dropout, "epochs": 2, "save_steps": 3, "num_max_checkpoints": 9}
    still = base | {"lr": 1e-30, "head_lr": 1e-30, "eval_on_start": True}
    decoder = {key: cases["listwise_ce-1-qwen2"][key] for key in ("model_type", "model_name_or_path")}
    answering = cases["listwise_ce-1-qwen2"] | YES_NO | {"max_len": 200}
    return {
        **{f"yes_no-{kind}": answering | {"model_name_or_path": model} for kind, model in causal.items()},
        "checkpointing-bert": base | {"gradient_checkpointing": True},
        "lora-bert": base | lora,
        "lora-qwen2": base | decoder | lora,
        "layerwise": base | decoder | {"start_layer": 1, "layer_distillation": 0.7},
        "bf16": base | {"mixed_precision": "bf16"},
        "onednn": cases["point_mse-3-bert"],
        "whole": whole,
        "again": whole | {"num_workers": 2},
        **{f"evaluation-{queries}": still | {"val_dataset": file} for queries, file in validation.items()},
    }


@pytest.fixture(scope="module")
def cases(tmp_path_factory, bert, qwen2, bert_with_dropout) -> dict[str, dict]:
    """The configuration of each case. Its output folder is for a run in this process."""
    folder = tmp_path_factory.mktemp("exactness")
    models = {"bert": ("bert_encoder", bert), "qwen2": ("llm_decoder", qwen2)}
    found = {}
    for case in CASES:
        loss, accumulation, family = case.split("-")
        keys = step_keys(loss, int(accumulation))
        keys["model_type"], keys["model_name_or_path"] = models[family]
        data = folder / f"{loss}-{accumulation}.jsonl"
        keys["train_dataset"] = write_jsonl(data, records_of(loss, int(accumulation)))
        found[case] = keys
    found["mixed"] = mixed_keys(found["listwise_ce-3-bert"], folder)
    validation = {
        queries: write_jsonl(folder / f"val-{queries}.jsonl", grouped_records(queries, seed=4)) for queries in (9, 1)
    }
    causal = {
        "tied": tiny_causal(folder / "tied", "qwen3", tied=True),
        "untied": tiny_causal(folder / "untied", "qwen2"),
    }
    found |= further_keys(found, validation, bert_with_dropout, causal)
    return {case: keys | {"output_dir": str(folder / case)} for case, keys in found.items()}


@pytest.fixture(scope="module")
def plain(cases):
    """The losses and the weights of the plain loop, by case."""

    @cache
    def of(case: str):
        loss, accumulation, _ = case.split("-")
        return plain_training(cases[case], step_size(loss, int(accumulation)), FACTORS)

    return of


@pytest.fixture(scope="module")
def alone(cases):
    """The folder of a case's run in one process, here; changes are to its keys."""

    @cache
    def of(case: str, **changes) -> Path:
        values = cases[case] | changes
        train(values | {"batch_size": PROCESSES * values["batch_size"]})
        return Path(values["output_dir"])

    return of


@pytest.fixture(scope="module", params=LAUNCH_FILES)
def outputs(request, cases, tmp_path_factory) -> Path:
    """A folder with the finished run of each case, under its name."""
    if "deepspeed" in request.param:
        pytest.importorskip("deepspeed")
    folder = tmp_path_factory.mktemp("engine")
    values = {case: keys | {"output_dir": str(folder / case)} for case, keys in cases.items()}
    values["resumed"] = values["whole"] | {
        "output_dir": str(folder / "resumed"),
        "resume": str(folder / "whole" / "checkpoint-3"),
    }
    (folder / "cases.json").write_text(json.dumps(values))
    command = engine_command(f"config/{request.param}.yaml", PROCESSES, "tests/engine_runs.py")
    done = launch([*command, str(folder / "cases.json")])
    assert done.returncode == 0, done.stderr
    return folder


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], atol: float) -> None:
    assert found.keys() == expected.keys()
    for name, value in found.items():
        torch.testing.assert_close(
            value, expected[name], atol=atol, rtol=0, msg=lambda text, name=name: f"{name}: {text}"
        )


def assert_plain_steps(output_dir: Path, losses: list[float], weights: dict[str, torch.Tensor]) -> None:
    logged = [line["loss"] for line in read_metrics(output_dir, "train")]
    assert logged == pytest.approx(losses, rel=2e-6, abs=1e-5)  # relative too: MarginMSE is near 10
    assert_close(final_weights(output_dir), weights, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_five_steps_equal_a_plain_loop(outputs, plain, case):
    assert_plain_steps(outputs / case, *plain(case))


@pytest.mark.parametrize("case", CASES)
def test_five_steps_of_one_process_equal_a_plain_loop(alone, plain, case):
    assert_plain_steps(alone(case), *plain(case))


@pytest.mark.parametrize("case", [case for case in CASES if case.startswith("pairwise_ranknet-")])
def test_the_cases_hold_a_step_without_a_pair(plain, case):
    losses, _ = plain(case)
    assert [loss == 0.0 for loss in losses] == [step == STEP_WITHOUT_PAIRS for step in range(5)]


def test_five_steps_over_two_files_and_losses_equal_a_plain_loop(outputs, alone, cases):
    assert step_size("listwise_ce", 3) == MIXED_STEP
    expected = plain_training(cases["mixed"], MIXED_STEP, FACTORS)
    assert_plain_steps(outputs / "mixed", *expected)
    assert_plain_steps(alone("mixed"), *expected)


def test_gradient_checkpointing_changes_nothing(outputs, plain):
    assert_plain_steps(outputs / "checkpointing-bert", *plain("listwise_ce-3-bert"))


def test_products_of_onednn_take_the_same_steps(outputs, plain):
    """engine_runs.py forces them. Some micro-batches have so few tokens that scoring would leave them to MKL."""
    assert_plain_steps(outputs / "onednn", *plain("point_mse-3-bert"))


@pytest.mark.parametrize("family", ["bert", "qwen2"])
def test_lora_with_gradient_checkpointing_takes_the_steps_of_one_process_without(outputs, alone, family):
    one, two = alone(f"lora-{family}", gradient_checkpointing=False), outputs / f"lora-{family}"
    assert_close(final_weights(two), final_weights(one), atol=1e-5)
    assert list((two / "adapter").glob("*.safetensors"))


def test_a_yes_no_head_takes_the_steps_of_one_process(outputs, alone):
    for case in ("yes_no-tied", "yes_no-untied"):
        assert_close(final_weights(outputs / case), final_weights(alone(case)), atol=1e-5)


def test_heads_at_several_layers_take_the_steps_of_one_process(outputs, alone):
    """Whose steps are those of a plain loop: tests/train/reranker/test_layerwise_training.py."""
    found, expected = final_weights(outputs / "layerwise"), final_weights(alone("layerwise"))
    assert WEIGHT in found
    assert_close(found, expected, atol=1e-5)
    logs = [[line["loss"] for line in read_metrics(folder, "train")]
            for folder in (outputs / "layerwise", alone("layerwise"))]  # fmt: skip
    assert logs[0] == pytest.approx(logs[1], abs=1e-5)


def test_bf16_trains_float32_weights_as_one_process_does(outputs, alone, request):
    for case, dtype in (("bf16", "torch.bfloat16"), ("listwise_ce-3-bert", "torch.float32")):
        assert json.loads((outputs / case / "hidden_dtypes.json").read_text()) == [dtype]
    found, expected = (
        [line["loss"] for line in read_metrics(folder, "train")] for folder in (outputs / "bf16", alone("bf16"))
    )
    # ZeRO-3's own linear function rounds once more, before it adds the bias: as far from here as bf16 from float32
    assert found == pytest.approx(expected, abs=1e-2 if "zero3" in request.node.name else 1e-4)
    weights = final_weights(outputs / "bf16")
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any((value != value.bfloat16()).any() for value in weights.values()), "not rounded either"
    assert_close(weights, final_weights(alone("bf16")), atol=5e-3 if "zero3" in request.node.name else 1e-3)


@pytest.mark.parametrize("case", ["again", "resumed"])
def test_a_seed_gives_the_same_bits_with_other_workers_and_after_resume(outputs, case):
    assert_close(final_weights(outputs / case), final_weights(outputs / "whole"), atol=0)


def test_one_process_gives_the_same_bits_with_other_workers(alone):
    assert_close(final_weights(alone("again")), final_weights(alone("whole")), atol=0)


@pytest.mark.parametrize("queries", [9, 1])
def test_validation_has_the_digits_of_one_process(outputs, alone, queries):
    """Also with fewer queries than processes."""
    case = f"evaluation-{queries}"
    one, two = (read_metrics(folder, "eval")[0] for folder in (alone(case), outputs / case))
    assert one == two and one["step"] == 0
