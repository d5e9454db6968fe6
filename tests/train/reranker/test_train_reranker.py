"""The command: exit codes, and errors as one line."""

import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from training_runs import ROOT, launch, read_metrics, write_yaml

from rag_retrieval.core.config_reader import load_config
from rag_retrieval.train.reranker.config import RerankerConfig
from rag_retrieval.train.reranker.train_reranker import main

SCRIPT = "rag_retrieval/train/reranker/train_reranker.py"


@pytest.fixture
def config(settings, tmp_path):
    return lambda *args, **changes: write_yaml(tmp_path / "run.yaml", settings(*args, **changes))


def errors(capsys) -> list[str]:
    return [line for line in capsys.readouterr().err.splitlines() if not line.startswith(("Loading", "Writing"))]


def test_a_run_returns_zero_and_options_win_over_the_file(config, tmp_path):
    assert main(["--config", config(), "--epochs", "2", "--output_dir", str(tmp_path / "other")]) == 0
    assert read_metrics(tmp_path / "other", "train")[-1]["step"] == 10


def test_a_mistake_in_the_configuration_is_an_error_line_and_code_2(config, capsys):
    assert main([f"--config={config()}", "--loss_typ", "listwise_ce"]) == 2
    (line,) = errors(capsys)
    assert line.startswith("error: --loss_typ: unknown key") and "loss_type" in line


def test_names_of_transformers_mean_ours():
    given = "--learning_rate 3e-5 --num_train_epochs 2 --per_device_train_batch_size 4 --warmup_ratio 0.2"
    given += " --logging_steps 7 --save_total_limit 5 --dataloader_num_workers 1 --report_to tensorboard"
    required = "--model_name_or_path owner/model --model_type bert_encoder --train_dataset README.md --output_dir out"
    found = load_config(RerankerConfig, None, [*required.split(), "--loss_type", "listwise_ce", *given.split()])
    assert (found.lr, found.epochs, found.batch_size, found.warmup_proportion) == (3e-5, 2, 4, 0.2)
    assert (found.log_interval, found.num_max_checkpoints, found.num_workers) == (7, 5, 1)
    assert found.log_with == "tensorboard"


@pytest.mark.parametrize(
    "options, told",
    [
        (["--fine_tune_type", "lora"], "--fine_tune_type: lora needs peft; run: pip install -e '.[lora]'"),
        (["--log_with", "wandb"], "--log_with: wandb needs wandb; run: pip install -e '.[wandb]'"),
        (["--report_to", "tensorboard"], "--report_to: tensorboard needs tensorboard; run: "),
    ],
)
def test_a_library_that_is_missing_is_named_before_anything_is_loaded(config, capsys, monkeypatch, options, told):
    monkeypatch.setattr("rag_retrieval.train.config.find_spec", lambda name: None)
    assert main(["--config", config(model_name_or_path="a-hub/model-that-is-not-here"), *options]) == 2
    (line,) = errors(capsys)
    assert line.startswith(f"error: {told}")


def test_help_names_the_keys_and_no_argument_says_what_is_missing(capsys):
    assert main(["--help"]) == 0 and "head_lr" in capsys.readouterr().out
    for arguments in ([], ["--lr", "1e-3"]):
        assert main(arguments) == 2
        shown = capsys.readouterr()
        assert "error: --model_name_or_path: is missing" in shown.err and not shown.out


def test_a_mistake_in_the_data_names_file_and_line_before_a_model_is_loaded(config, tmp_path, capsys):
    path = config(model_name_or_path="a-hub/model-that-is-not-here")
    (tmp_path / "train.jsonl").write_text('{"query": "q", "hits": []}\n')
    assert main(["--config", path]) == 2
    assert f"error: {tmp_path / 'train.jsonl'}:1:" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_an_error_line(config, capsys):
    assert main(["--config", config(model_name_or_path="a-hub/model-that-is-not-here")]) == 2
    (line,) = errors(capsys)
    assert "no such folder" in line and line.endswith("run: hf download a-hub/model-that-is-not-here")


def test_a_contradiction_of_launcher_and_configuration_is_an_error_line(config, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main(["--config", config()]) == 2
    assert "error: mixed_precision is no in the training configuration but bf16" in capsys.readouterr().err


def test_processes_that_would_train_separate_copies_are_an_error_line(config, capsys, monkeypatch):
    from rag_retrieval.train import launch as launch_module

    monkeypatch.setenv("WORLD_SIZE", "2")  # without the rest that a launcher sets
    monkeypatch.setattr(launch_module, "adapt_to_cpu", lambda: None)
    assert main(["--config", config()]) == 2
    assert "error: the launcher started 2 processes but accelerate sees 1" in capsys.readouterr().err


def test_a_second_run_in_the_same_folder_is_an_error_line(config, capsys):
    path = config()
    assert main(["--config", path]) == 0
    assert main(["--config", path]) == 2
    printed = capsys.readouterr().err
    assert "already holds a run" in printed and "--resume auto" in printed


def test_a_loss_that_is_not_finite_is_code_1_without_a_traceback(config, capsys):
    assert main(["--config", config("listwise_ce", lr=1e30, head_lr=1e30, max_grad_norm="None")]) == 1
    lines = errors(capsys)
    assert any(line.startswith("error: the ") and "no weight was changed by it" in line for line in lines)
    assert not any("Traceback" in line for line in lines)


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_in_training_ends_after_the_step_with_its_code(config, tmp_path, capsys, monkeypatch, number, code):
    from rag_retrieval.train.loop import Trainer

    take_step = Trainer.train_step

    def step_with_signal(self, micro_batches):
        os.kill(os.getpid(), number) if self.state.step == 2 else None
        take_step(self, micro_batches)

    path, before = config(), signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(Trainer, "train_step", step_with_signal)
        assert main(["--config", path]) == code
    folder = tmp_path / "run" / "checkpoint-3"
    stopped, _, advice = capsys.readouterr().err.partition("; continue with: rag-retrieval train ")
    assert stopped.endswith(f"error: stopped by {number.name} after step 3 of 5, saved in {folder}") and folder.exists()
    assert main(advice.split()) == 0 and (tmp_path / "run" / "model").exists()
    assert signal.getsignal(number) == before, "handlers are given back"


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_before_the_first_step_is_one_line(config, capsys, monkeypatch, number, code):
    from rag_retrieval.train.reranker import run as run_module

    def load(config):
        os.kill(os.getpid(), number)
        time.sleep(1)

    monkeypatch.setattr(run_module, "load_scorer", load)
    assert main(["--config", config()]) == code
    assert errors(capsys)[-1].startswith(f"error: interrupted by {number.name}; continue with --resume auto")


def test_an_interrupt_while_modules_are_imported_is_one_line(config, tmp_path):
    """A process of its own, since it leaves at once. The import of torch is the longest."""
    (tmp_path / "torch.py").write_text(
        "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(20)\nassert False"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}:{ROOT}"}
    program = [sys.executable, "-m", "rag_retrieval.cli", "train", "--config", config()]
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
    assert (done.returncode, done.stderr) == (130, "error: interrupted by SIGINT\n")


def test_an_error_of_ours_keeps_its_traceback(config, capsys, monkeypatch):
    from rag_retrieval.train.loop import Trainer

    def fail(self, micro_batches):
        raise ValueError("a thing that cannot be")

    monkeypatch.setattr(Trainer, "train_step", fail)
    assert main(["--config", config()]) == 1
    told = capsys.readouterr().err
    assert told.splitlines().count("error:") == 1 and "error:\nTraceback" in told and "in fail" in told
    assert "Checkpoints" not in told, "none was written"


def test_an_error_after_a_checkpoint_says_how_to_continue(config, capsys, monkeypatch):
    from rag_retrieval.train.loop import Trainer

    take_step = Trainer.train_step

    def fail_at_the_third(self, micro_batches):
        if self.state.step == 2:
            raise ValueError("a thing that cannot be")
        return take_step(self, micro_batches)

    monkeypatch.setattr(Trainer, "train_step", fail_at_the_third)
    assert main(["--config", config(save_steps=1)]) == 1
    told = capsys.readouterr().err
    assert "Checkpoints written before are intact; continue with: rag-retrieval train" in told
    assert "--resume auto" in told


def test_a_process_whose_peer_has_ended_says_so_without_a_traceback(config, capsys, monkeypatch):
    from rag_retrieval.train.loop import Trainer

    def fail(self, micro_batches):
        raise RuntimeError("[gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:10917. Check")

    monkeypatch.setattr(Trainer, "train_step", fail)
    assert main(["--config", config()]) == 1
    assert errors(capsys)[-1].startswith("error: another process of this run has ended")


def test_a_full_disk_is_an_error_line_and_code_1(config, tmp_path, capsys):
    """Files may not grow beyond what a small state needs: the weights are larger."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    path = config(save_steps=2)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, hard))
    try:
        assert main(["--config", path]) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    told = errors(capsys)[-1]
    assert told.startswith(f"error: output_dir {tmp_path / 'run'}: ") and "--resume auto" in told
    assert not list((tmp_path / "run").glob("*checkpoint*"))
    assert main(["--config", path, "--resume", "auto"]) == 0


def test_a_read_only_folder_is_an_error_line_at_once(config, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    assert main(["--config", config(model_name_or_path="a-hub/model-that-is-not-here")]) == 2
    assert f"error: output_dir: {tmp_path} is not writable; take another output_dir" in capsys.readouterr().err


def test_a_traceback_can_be_asked_for(config, monkeypatch):
    from rag_retrieval.core.distributed import StartError

    monkeypatch.setenv("RAG_RETRIEVAL_TRACEBACK", "1")
    with pytest.raises(StartError):
        main(["--config", config(model_name_or_path="a-hub/model-that-is-not-here")])


@pytest.mark.slow
@pytest.mark.parametrize("command", [["rag_retrieval.cli", "train"], ["accelerate.commands.launch", "--cpu", SCRIPT]])
def test_the_command_trains_from_the_repository_root(config, tmp_path, command):
    done = launch([*command, "--config", config()])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr


@pytest.mark.slow
def test_a_killed_process_resumes(config, tmp_path):
    """A real kill in the middle of a run, not an exception."""
    path = config(epochs=400, save_steps=20, num_workers=2)
    program = [sys.executable, "-m", "rag_retrieval.cli", "train", "--config", path]
    process = subprocess.Popen(program, cwd=ROOT, env=os.environ, stderr=subprocess.DEVNULL)
    output_dir = tmp_path / "run"
    while not list(output_dir.glob("checkpoint-*")):
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    resumed = ["--config", path, "--resume", "auto"]
    reached = max(int(folder.name.split("-")[1]) for folder in Path(output_dir).glob("checkpoint-*"))
    assert main([*resumed, "--epochs", str(reached // 5 + 8), "--resume_with_changes", "true"]) == 0
    assert read_metrics(output_dir, "train")[-1]["step"] == reached // 5 * 5 + 40
