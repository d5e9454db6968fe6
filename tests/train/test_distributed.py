"""Real launchers with two processes on the CPU: the same training as in one process."""

from pathlib import Path

import pytest
import torch
from training_runs import (
    final_weights,
    grouped_records,
    launch,
    pointwise_records,
    read_metrics,
    train,
    write_jsonl,
    write_yaml,
)

from rag_retrieval.train.checkpoints import read_state

pytestmark = pytest.mark.slow

SCRIPT = "rag_retrieval/train/reranker/train_reranker.py"
TORCHRUN = ["torch.distributed.run", "--nproc_per_node", "2"]
CPU = {"ACCELERATE_USE_CPU": "true"}


def accelerate_launch(config_file: str) -> list[str]:
    command = ["accelerate.commands.launch", "--config_file", config_file, "--num_processes", "2"]
    return [*command, "--main_process_port", "29517"]


def run_in_two(values: dict, tmp_path: Path, command: list[str], script: str = SCRIPT, **environment: str):
    return launch([*command, script, "--config", write_yaml(tmp_path / "two.yaml", values)], **environment)


def assert_same_training(one: dict, two: dict, tolerance: float = 1e-5) -> None:
    first, second = (final_weights(values["output_dir"]) for values in (one, two))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=tolerance, rtol=0)
    logs = [read_metrics(Path(values["output_dir"]), "train") for values in (one, two)]
    assert [line["loss"] for line in logs[0]] == pytest.approx(
        [line["loss"] for line in logs[1]], abs=tolerance
    )
    assert [line["lr"] for line in logs[0]] == [line["lr"] for line in logs[1]]


@pytest.fixture
def both(settings, tmp_path):
    """The same run for one process and for two: 90 records, 32 to a step, the last step partial."""

    def make(loss_type: str, batch_size: int = 32, **changes) -> tuple[dict, dict]:
        records = pointwise_records(81) if loss_type.startswith("point") else grouped_records(81)
        changes |= {"adam_epsilon": 1e-3, "batch_size": batch_size}
        one = settings(loss_type, records, **changes)
        return one, one | {"batch_size": batch_size // 2, "output_dir": str(tmp_path / "two")}

    return make


@pytest.mark.parametrize("loss_type", ["point_ce", "pairwise_ranknet"])
def test_two_processes_take_the_steps_of_one(both, tmp_path, loss_type):
    one, two = both(loss_type)
    train(one)
    done = run_in_two(two, tmp_path, TORCHRUN, **CPU)
    assert done.returncode == 0, done.stderr
    assert_same_training(one, two)
    assert "Traceback" not in done.stderr


def test_a_process_with_nothing_to_do_and_accumulation_do_not_hang_or_change_the_step(both, tmp_path):
    # 80 groups to a step, then 1; the token budget cuts their batches into different numbers of parts
    one, two = both("listwise_ce", batch_size=16, gradient_accumulation_steps=5, max_tokens_per_batch=96)
    two |= {"max_tokens_per_batch": 96}  # the two plan different numbers of micro-batches
    train(one)
    done = run_in_two(two, tmp_path, TORCHRUN, **CPU)
    assert done.returncode == 0, done.stderr
    assert_same_training(one, two)


@pytest.mark.parametrize("queries", [9, 1])
def test_validation_has_the_same_digits_for_any_number_of_processes(both, tmp_path, queries):
    """Also with fewer batches than processes."""
    validation = write_jsonl(tmp_path / "val.jsonl", grouped_records(queries, seed=4))
    one, two = both("listwise_ce", val_dataset=validation, lr=1e-30, head_lr=1e-30, eval_on_start=True)
    two = two | {"batch_size": 32, "gradient_accumulation_steps": 1}
    train(one)
    done = run_in_two(two, tmp_path, TORCHRUN, **CPU)
    assert done.returncode == 0, done.stderr
    first, second = (read_metrics(Path(values["output_dir"]), "eval")[0] for values in (one, two))
    assert first == second and first["step"] == 0


def test_two_processes_resume_to_the_same_bits(both, tmp_path, bert_with_dropout):
    _, whole = both("listwise_ce", batch_size=8, model_name_or_path=bert_with_dropout, epochs=2, save_steps=4)
    whole |= {"num_max_checkpoints": 9}
    assert run_in_two(whole, tmp_path, TORCHRUN, **CPU).returncode == 0
    resumed = whole | {
        "output_dir": str(tmp_path / "resumed"),
        "resume": str(Path(whole["output_dir"]) / "checkpoint-8"),
    }
    done = run_in_two(resumed, tmp_path, TORCHRUN, **CPU)
    assert done.returncode == 0, done.stderr
    first, second = (final_weights(values["output_dir"]) for values in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_a_loss_that_is_not_finite_ends_both_processes_with_one_message(both, tmp_path):
    _, two = both("listwise_ce", lr=1e30, head_lr=1e30, max_grad_norm=None, warmup_proportion=0.0)
    done = run_in_two(two, tmp_path, TORCHRUN, **CPU)
    assert done.returncode != 0
    assert done.stderr.count("error: the ") == 1
    assert not (Path(two["output_dir"]) / "model").exists()


def test_a_mistake_in_the_data_ends_both_processes_with_one_message(both, tmp_path):
    _, two = both("listwise_ce")
    Path(two["train_dataset"]).write_text('{"query": "q", "hits": []}\n')
    done = run_in_two(two, tmp_path, TORCHRUN, **CPU)
    assert done.returncode != 0
    assert done.stderr.count("train.jsonl:1:") == 1, done.stderr


@pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without an accelerator")
def test_fsdp_settings_on_a_cpu_machine_train_together(both, tmp_path):
    one, two = both("listwise_ce")
    train(one)
    done = run_in_two(two, tmp_path, accelerate_launch("config/xlmroberta_default_config.yaml"))
    assert done.returncode == 0, done.stderr
    assert "instead of FSDP" in done.stderr
    assert_same_training(one, two)


DEEPSPEED = accelerate_launch("config/deepspeed/deepspeed_zero1.yaml")


@pytest.mark.parametrize("max_grad_norm", [0.05, None])
def test_deepspeed_takes_the_same_steps_and_clips_as_told(both, tmp_path, max_grad_norm):
    pytest.importorskip("deepspeed")
    one, two = both("listwise_ce", batch_size=8, max_grad_norm=max_grad_norm, gradient_accumulation_steps=2)
    train(one)
    done = run_in_two(two, tmp_path, DEEPSPEED)
    assert done.returncode == 0, done.stderr
    assert_same_training(one, two)


def test_deepspeed_resumes_to_the_same_bits(both, tmp_path):
    pytest.importorskip("deepspeed")
    _, whole = both("listwise_ce", batch_size=16, save_steps=2)
    assert run_in_two(whole, tmp_path, DEEPSPEED).returncode == 0
    checkpoint = Path(whole["output_dir"]) / "checkpoint-2"
    assert read_state(checkpoint).step == 2
    resumed = whole | {"resume": str(checkpoint), "output_dir": str(tmp_path / "resumed")}
    done = run_in_two(resumed, tmp_path, DEEPSPEED)
    assert done.returncode == 0, done.stderr
    first, second = (final_weights(values["output_dir"]) for values in (whole, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)


ZERO3 = accelerate_launch("config/deepspeed/deepspeed_zero3.yaml")


@pytest.mark.parametrize("lora", [{}, {"lora_r": 4, "lora_target_modules": "all-linear"}])
def test_zero3_saves_whole_weights_under_their_names_and_merges_adapters(both, tmp_path, lora):
    pytest.importorskip("deepspeed")
    one, two = both("listwise_ce", **lora)
    train(one)
    done = run_in_two(two, tmp_path, ZERO3)
    assert done.returncode == 0, done.stderr
    assert_same_training(one, two)


def test_deepspeed_keeps_float32_weights_under_bf16(both, tmp_path):
    pytest.importorskip("deepspeed")
    one, two = both("listwise_ce", mixed_precision="bf16")
    train(one)
    done = run_in_two(two, tmp_path, DEEPSPEED)
    assert done.returncode == 0, done.stderr
    weights = final_weights(two["output_dir"])
    assert {value.dtype for value in weights.values()} == {torch.float32}
    assert any((value != value.bfloat16()).any() for value in weights.values()), "not rounded either"
    assert_same_training(one, two, tolerance=5e-3)


FSDP = accelerate_launch("config/default_fsdp.yaml")


@pytest.mark.skipif(torch.accelerator.is_available(), reason="needs a GPU per process there")
def test_fsdp_takes_the_same_steps_and_resumes_to_the_same_bits(both, tmp_path):
    one, two = both("listwise_ce", batch_size=16, gradient_accumulation_steps=2, max_tokens_per_batch=96)
    train(one)
    two |= {"save_steps": 2, "val_dataset": write_jsonl(tmp_path / "val.jsonl", grouped_records(5, seed=4))}
    done = run_in_two(two, tmp_path, FSDP, script="tests/fsdp_on_cpu.py")
    assert done.returncode == 0, done.stderr
    assert_same_training(one, two)
    checkpoint = Path(two["output_dir"]) / "checkpoint-2"
    assert list(checkpoint.glob("*/*.distcp")), "weights are saved in shards"
    resumed = two | {"resume": str(checkpoint), "output_dir": str(tmp_path / "resumed")}
    done = run_in_two(resumed, tmp_path, FSDP, script="tests/fsdp_on_cpu.py")
    assert done.returncode == 0, done.stderr
    first, second = (final_weights(values["output_dir"]) for values in (two, resumed))
    assert all(torch.equal(first[name], second[name]) for name in first)
