"""Whole runs that are resumed with another configuration or on other processes, or that something outside breaks."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from training_runs import ROOT, final_weights, grouped_records, launch, read_metrics, train, write_jsonl, write_yaml

from rag_retrieval.core.distributed import StartError
from rag_retrieval.core.signals import TrainingStopped
from rag_retrieval.train.loop import Trainer
from rag_retrieval.train.reranker.task import RerankerTask
from rag_retrieval.train.run_folder import Provenance
from rag_retrieval.train.task import ProcessFailure

SCRIPT = "rag_retrieval/train/reranker/train_reranker.py"
TORCHRUN = ["torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
CPU = {"ACCELERATE_USE_CPU": "true"}


@pytest.fixture
def stop_after(monkeypatch):
    """Train until a step is done, as a run that was asked to stop."""

    def run(values: dict, step: int) -> None:
        take_step = Trainer.train_step

        def step_and_stop(self, micro_batches):
            take_step(self, micro_batches)
            if self.state.step == step:
                self.stop_request.note(signal.SIGTERM, None)

        with monkeypatch.context() as patch:
            patch.setattr(Trainer, "train_step", step_and_stop)
            with pytest.raises(TrainingStopped):
                train(values)

    return run


# --- resuming otherwise ---


def test_a_checkpoint_tells_what_it_was_made_of(settings, stop_after):
    values = settings()
    stop_after(values, 2)
    made = Provenance.read(Path(values["output_dir"]) / "checkpoint-2")
    assert made.configuration["lr"] == 1e-3 and made.engine == "DDP" and made.processes == 1
    assert made.versions["torch"] == torch.__version__ and made.data.keys() == {"train_dataset"}


def test_a_resume_with_another_configuration_says_every_difference_and_changes_nothing(settings, stop_after):
    values = settings()
    stop_after(values, 2)
    output_dir = Path(values["output_dir"])
    before = {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()}
    with pytest.raises(StartError) as caught:
        train(values | {"resume": "auto", "lr": 2e-3, "adam_beta1": 0.5, "batch_size": 5, "num_workers": 1})
    lines = str(caught.value).splitlines()[1:-1]
    assert sorted(lines) == [
        "  adam_beta1: was 0.9, now 0.5",
        "  batch_size x gradient_accumulation_steps x processes: was 4 x 1 x 1 = 4, now 5 x 1 x 1 = 5",
        "  head_lr: was 0.01, now 0.02",
        "  lr: was 0.001, now 0.002",
    ]
    assert {path: path.read_bytes() for path in output_dir.rglob("*") if path.is_file()} == before


def test_resume_with_changes_continues_with_the_new_values(settings, stop_after, monkeypatch):
    values = settings(warmup_proportion=0.0, stable_proportion=1.0)
    stop_after(values, 2)
    groups = []
    take_step = Trainer.train_step

    def look(self, micro_batches):
        take_step(self, micro_batches)
        groups.append([(group["lr"], group["betas"]) for group in self.optimizer.param_groups])

    monkeypatch.setattr(Trainer, "train_step", look)
    changes = {"lr": 2e-3, "head_lr": 5e-3, "adam_beta1": 0.5}
    train(values | changes | {"resume": "auto", "resume_with_changes": True})
    assert {entry for step in groups for entry in step} == {(2e-3, (0.5, 0.999)), (5e-3, (0.5, 0.999))}
    assert [line["lr"] for line in read_metrics(Path(values["output_dir"]), "train")] == [1e-3, 1e-3, 2e-3, 2e-3, 2e-3]


def test_data_that_changed_under_the_same_name_stop_the_resume(settings, stop_after, tmp_path):
    values = settings()
    stop_after(values, 2)
    write_jsonl(tmp_path / "train.jsonl", grouped_records(20, seed=5))
    with pytest.raises(StartError, match=r"train_dataset: was .*train.jsonl \(content \w{8}\), now"):
        train(values | {"resume": "auto"})


def test_data_that_moved_do_not(settings, stop_after, tmp_path):
    values = settings()
    train(values)
    moved = values | {"output_dir": str(tmp_path / "moved")}
    stop_after(moved, 3)
    (tmp_path / "train.jsonl").rename(tmp_path / "elsewhere.jsonl")
    train(moved | {"resume": "auto", "train_dataset": str(tmp_path / "elsewhere.jsonl")})
    whole, resumed = final_weights(values["output_dir"]), final_weights(moved["output_dir"])
    assert all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_the_same_step_size_with_other_data_is_still_refused(settings, stop_after, tmp_path):
    values = settings()
    stop_after(values, 2)
    write_jsonl(tmp_path / "train.jsonl", grouped_records(30))
    with pytest.raises(StartError, match="5 optimizer steps per epoch, and this run has 8"):
        train(values | {"resume": "auto", "resume_with_changes": True})


# --- memory ---


def test_memory_that_is_full_tells_the_longest_pair_and_the_tokens(settings, monkeypatch):
    def fail(self, model, micro_batch):
        lengths.append(micro_batch.pairs.lengths.tolist())
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")

    lengths = []
    monkeypatch.setattr(RerankerTask, "loss_sums", fail)
    with pytest.raises(ProcessFailure) as caught:
        train(settings(max_tokens_per_batch=200, gradient_checkpointing=False))
    first, message = lengths[0], str(caught.value)
    expected = f"at a micro-batch of {len(first)} pairs, the longest of {max(first)} tokens, {sum(first)} tokens in all"
    assert expected in message and "train.jsonl:" in message
    for key in ("max_tokens_per_batch 200", "batch_size 4", "gradient_checkpointing False", "max_len 48"):
        assert key in message


# --- several processes ---


@pytest.fixture
def two(settings, tmp_path, bert_with_dropout):
    """Configuration files of a run for two processes, 10 steps; `two(key=value)`."""

    def make(**changes) -> Path:
        values = settings(records=grouped_records(40), batch_size=2, epochs=1, model_name_or_path=bert_with_dropout)
        return Path(write_yaml(tmp_path / "two.yaml", values | changes))

    return make


@pytest.mark.slow
def test_ddp_resumes_on_one_process_and_on_two_with_the_product_kept(two, settings, tmp_path, bert):
    whole = json.loads(two(model_name_or_path=bert, save_steps=4, num_max_checkpoints=9, adam_epsilon=1e-3).read_text())
    done = launch([*TORCHRUN, SCRIPT, "--config", str(tmp_path / "two.yaml")], **CPU)
    assert done.returncode == 0, done.stderr
    expected = final_weights(whole["output_dir"])
    on_one = whole | {"resume": str(tmp_path / "run" / "checkpoint-4"), "output_dir": str(tmp_path / "one")}
    with pytest.raises(StartError, match="processes: was 2 x 1 x 2 = 4, now 2 x 1 x 1 = 2"):
        train(on_one)
    train(on_one | {"batch_size": 4, "save_steps": 2})
    back = on_one | {"resume": str(tmp_path / "one" / "checkpoint-6"), "output_dir": str(tmp_path / "back")}
    done = launch([*TORCHRUN, SCRIPT, "--config", write_yaml(tmp_path / "back.yaml", back)], **CPU)
    assert done.returncode == 0, done.stderr
    for output_dir in ("one", "back"):
        for name, value in final_weights(tmp_path / output_dir).items():
            torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_an_exception_on_one_process_ends_all_with_its_traceback(two):
    fault = json.dumps({"do": "exception", "phase": "step", "call": 3, "delay": 0.0, "ranks": [1]})
    done = launch([*TORCHRUN, "benchmarks/fault_runs.py", str(two(wait_minutes=30)), fault], **CPU)  # of 4 minutes
    assert done.returncode != 0
    assert "error in process 1:\nTraceback" in done.stderr and "injected by the fault harness" in done.stderr
    assert "error in process 0" not in done.stderr, "the other has no traceback of its own"


@pytest.mark.slow
def test_a_stopped_process_ends_the_others_after_wait_minutes(two):
    fault = json.dumps({"do": "stop one", "phase": "step", "call": 3, "delay": 0.0, "ranks": [1]})
    done = launch([*TORCHRUN, "benchmarks/fault_runs.py", str(two(wait_minutes=0.1)), fault], **CPU)
    assert done.returncode != 0
    assert "has not answered for 0.1 minutes (wait_minutes)" in done.stderr, done.stderr


@pytest.mark.slow
def test_a_ctrl_c_that_reaches_launcher_and_processes_saves_one_checkpoint(two, tmp_path):
    """As from a terminal, where all of the group get it, and torchrun passes it on."""
    program = [sys.executable, "-m", *TORCHRUN, SCRIPT, "--config", str(two(epochs=400))]
    environment = os.environ | CPU | {"OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(
        program, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    metrics = tmp_path / "run" / "metrics.jsonl"
    while not (metrics.exists() and metrics.read_text()):
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGINT)
    errors = process.communicate(timeout=600)[1]
    assert process.returncode != 0 and "error: stopped by SIGINT after step" in errors
    assert len(list((tmp_path / "run").glob("checkpoint-*"))) == 1
