"""Real launchers on the CPU: what starts, what is refused, and how several processes end.

That engines take the right steps is in test_exactness.py.
"""

import json
from pathlib import Path

import pytest
import torch
import yaml
from training_runs import (
    engine_command,
    final_weights,
    grouped_records,
    launch,
    pointwise_records,
    read_metrics,
    train,
    write_jsonl,
    write_yaml,
)

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "rag_retrieval/train/reranker/train_reranker.py"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2", SCRIPT]
CPU = {"ACCELERATE_USE_CPU": "true"}
NO_GPU = pytest.mark.skipif(torch.accelerator.is_available(), reason="for machines without an accelerator")

pytestmark = pytest.mark.slow


def run_in_two(values: dict, tmp_path: Path, command: list[str], **environment: str):
    return launch([*command, "--config", write_yaml(tmp_path / "two.yaml", values)], **environment)


def assert_same_training(one: dict, two: dict, tolerance: float = 1e-5, logs: bool = True) -> None:
    first, second = (final_weights(values["output_dir"]) for values in (one, two))
    for name in first:
        torch.testing.assert_close(first[name], second[name], atol=tolerance, rtol=0)
    if not logs:  # of a run that began in the middle
        return
    logs = [read_metrics(Path(values["output_dir"]), "train") for values in (one, two)]
    assert [line["loss"] for line in logs[0]] == pytest.approx([line["loss"] for line in logs[1]], abs=tolerance)
    assert [line["lr"] for line in logs[0]] == [line["lr"] for line in logs[1]]


@pytest.fixture
def both(settings, tmp_path):
    """The same run for one process and for two: 81 records, 32 to a step, the last step partial."""

    def make(loss_type: str = "listwise_ce", **changes) -> tuple[dict, dict]:
        records = pointwise_records(81) if loss_type.startswith("point") else grouped_records(81)
        one = settings(loss_type, records, **{"adam_epsilon": 1e-3, "batch_size": 32} | changes)
        return one, one | {"batch_size": one["batch_size"] // 2, "output_dir": str(tmp_path / "two")}

    return make


# --- what starts ---


def test_torchrun_takes_the_steps_of_one_process_and_resumes_to_the_same_bits(both, tmp_path, bert_with_dropout):
    one, two = both("pairwise_ranknet")
    train(one)
    changes = {"model_name_or_path": bert_with_dropout, "batch_size": 8, "epochs": 2, "save_steps": 4}
    whole = two | changes | {"num_max_checkpoints": 9, "output_dir": str(tmp_path / "whole")}
    (tmp_path / "cases.json").write_text(json.dumps({"two": two, "whole": whole}))
    done = launch([*TORCHRUN[:-1], "tests/engine_runs.py", str(tmp_path / "cases.json")], **CPU)
    assert done.returncode == 0, done.stderr
    assert_same_training(one, two)
    assert "Traceback" not in done.stderr
    checkpoint = {"output_dir": str(tmp_path / "resumed"), "resume": str(tmp_path / "whole" / "checkpoint-8")}
    done = run_in_two(whole | checkpoint, tmp_path, TORCHRUN, **CPU)
    assert done.returncode == 0, done.stderr
    first, second = (final_weights(tmp_path / name) for name in ("whole", "resumed"))
    assert all(torch.equal(first[name], second[name]) for name in first)


@NO_GPU
def test_fsdp_settings_on_a_cpu_machine_train_together(both, tmp_path):
    one, two = both()
    train(one)
    done = run_in_two(two, tmp_path, engine_command("config/xlmroberta_default_config.yaml", 2, SCRIPT))
    assert done.returncode == 0, done.stderr
    assert "instead of FSDP" in done.stderr
    assert_same_training(one, two)


def resumed_on(processes: int, values: dict, tmp_path: Path, file: str, script: str):
    path = write_yaml(tmp_path / f"on-{processes}.yaml", values)
    return launch([*engine_command(f"config/{file}.yaml", processes, script), "--config", path])


def test_fsdp_resumes_on_more_and_on_fewer_processes(settings, tmp_path):
    """Sharded weights and optimizer states are cut anew; the product of batch size and processes stays."""
    whole = settings(records=grouped_records(60), batch_size=6, adam_epsilon=1e-3)  # 10 steps
    train(whole)
    script, file = "tests/fsdp_on_cpu.py", "default_fsdp"
    on_two = whole | {"batch_size": 3, "save_steps": 4, "num_max_checkpoints": 9, "output_dir": str(tmp_path / "two")}
    on_three = on_two | {"batch_size": 2, "output_dir": str(tmp_path / "three"), "save_steps": 2}
    on_three["resume"] = str(tmp_path / "two" / "checkpoint-4")
    back = on_two | {"output_dir": str(tmp_path / "back"), "resume": str(tmp_path / "three" / "checkpoint-6")}
    for processes, values in ((2, on_two), (3, on_three), (2, back)):
        done = resumed_on(processes, values, tmp_path, file, script)
        assert done.returncode == 0, done.stderr
        assert ("resuming from" in done.stderr) == ("resume" in values)
        assert_same_training(whole | {"output_dir": values["output_dir"]}, whole, logs=False)


def test_deepspeed_says_that_it_resumes_on_as_many_processes_alone(settings, tmp_path):
    pytest.importorskip("deepspeed")
    values = settings(batch_size=2, save_steps=2)
    file = "deepspeed/deepspeed_zero1"
    assert resumed_on(2, values, tmp_path, file, SCRIPT).returncode == 0
    other = values | {"batch_size": 4, "output_dir": str(tmp_path / "other")}
    other["resume"] = str(tmp_path / "run" / "checkpoint-2")
    done = resumed_on(1, other, tmp_path, file, SCRIPT)
    assert done.returncode != 0
    refusal = "written by DeepSpeed ZeRO-1 on 2 processes, and DeepSpeed resumes on that number alone, not on 1"
    assert refusal in done.stderr
    assert not (tmp_path / "other" / "model").exists()


def test_three_processes_validate_to_the_digits_of_one(settings, tmp_path):
    """Any number of queries, fewer than processes too."""
    still = {"lr": 1e-30, "head_lr": 1e-30, "eval_on_start": True}
    cases = {}
    for loss, records in (("listwise_ce", grouped_records), ("point_ce", pointwise_records)):
        for count in (1, 2, 9):
            file = write_jsonl(tmp_path / f"{loss}-{count}.jsonl", records(count, seed=4))
            data = write_jsonl(tmp_path / f"{loss}-train.jsonl", records(20))
            cases[f"{loss}-{count}"] = settings(loss, train_dataset=data, val_dataset=file, **still)
    one, three = ({case: str(tmp_path / name / case) for case in cases} for name in ("one", "three"))
    for case, values in cases.items():
        train(values | {"output_dir": one[case]})
    launched = {case: values | {"output_dir": three[case]} for case, values in cases.items()}
    (tmp_path / "cases.json").write_text(json.dumps(launched))
    command = engine_command("config/ddp.yaml", 3, "tests/engine_runs.py")
    done = launch([*command, str(tmp_path / "cases.json")])
    assert done.returncode == 0, done.stderr
    for case in cases:
        first, second = (read_metrics(Path(folders[case]), "eval")[0] for folders in (one, three))
        assert first == second and first["step"] == 0, case


# --- what is refused ---


def changed_file(tmp_path: Path, file: str, **changes) -> str:
    """A copy of a shipped file with other values, those of its nested part too."""
    settings = yaml.safe_load((ROOT / "config" / file).read_text())
    nested = settings.get("fsdp_config", settings.get("deepspeed_config", {}))
    for key, value in changes.items():
        (settings if key in settings else nested)[key] = value
    return write_yaml(tmp_path / "accelerate.yaml", settings)


ZERO = "deepspeed/deepspeed_zero1.yaml"


@pytest.mark.parametrize(
    "processes, file, changes, message",
    [
        (2, ZERO, {"gradient_accumulation_steps": 4}, "gradient_accumulation_steps is 1"),
        (1, ZERO, {"gradient_clipping": 0.3}, "max_grad_norm (gradient_clipping) is 1.0"),
        (1, "ddp.yaml", {"mixed_precision": "bf16"}, "mixed_precision is no in the training configuration but bf16"),
        (1, "default_fsdp.yaml", {"fsdp_transformer_layer_cls_to_wrap": "Qwen2DecoderLayer"},
         "BertEmbeddings, BertLayer"),
        pytest.param(2, "ddp.yaml", {"distributed_type": "MULTI_CPU"}, "asked for several processes", marks=NO_GPU),
    ],
)  # fmt: skip
def test_a_launch_file_that_contradicts_the_run_ends_it_with_one_message(
    both, tmp_path, processes, file, changes, message
):
    if "deepspeed" in file:
        pytest.importorskip("deepspeed")
    _, two = both()
    done = run_in_two(two, tmp_path, engine_command(changed_file(tmp_path, file, **changes), processes, SCRIPT))
    assert done.returncode != 0
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 1 and message in errors[0], done.stderr
    assert not Path(two["output_dir"], "model").exists()


# --- how processes end ---


def test_a_loss_that_is_not_finite_ends_both_processes_with_one_message(both, tmp_path):
    _, two = both(lr=1e30, head_lr=1e30, max_grad_norm=None, warmup_proportion=0.0)
    done = run_in_two(two, tmp_path, TORCHRUN, **CPU)
    assert done.returncode != 0
    assert len([line for line in done.stderr.splitlines() if line.startswith("error: the ")]) == 1, done.stderr
    assert not (Path(two["output_dir"]) / "model").exists()


def test_a_mistake_in_the_data_is_one_message_and_the_last_of_the_launcher_s_summary(both, tmp_path):
    _, two = both()
    Path(two["train_dataset"]).write_text('{"query": "q", "hits": []}\n')
    done = run_in_two(two, tmp_path, TORCHRUN, **CPU)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if "train.jsonl:1:" in line]
    assert len(said) == 2 and said[0].startswith("error: "), done.stderr
    assert said[1] in done.stderr.splitlines()[-3:], "nothing but a line of the frame is below it"
