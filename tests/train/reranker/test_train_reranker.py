"""The command: exit codes, and errors as one line."""

import os
from pathlib import Path

import pytest
from training_runs import ROOT, launch, read_metrics, write_yaml

from rag_retrieval.train.reranker import train_reranker
from rag_retrieval.train.reranker.train_reranker import main

SCRIPT = "rag_retrieval/train/reranker/train_reranker.py"


@pytest.fixture
def config(settings, tmp_path):
    return lambda *args, **changes: write_yaml(tmp_path / "run.yaml", settings(*args, **changes))


def errors(capsys) -> list[str]:
    return [
        line for line in capsys.readouterr().err.splitlines() if not line.startswith(("Loading", "Writing"))
    ]


def test_a_run_returns_zero_and_options_win_over_the_file(config, tmp_path):
    assert main(["--config", config(), "--epochs", "2", "--output_dir", str(tmp_path / "other")]) == 0
    assert read_metrics(tmp_path / "other", "train")[-1]["step"] == 10


def test_a_mistake_in_the_configuration_is_an_error_line_and_code_2(config, capsys):
    assert main([f"--config={config()}", "--loss_typ", "listwise_ce"]) == 2
    (line,) = errors(capsys)
    assert line.startswith("error: --loss_typ: unknown key") and "loss_type" in line


def test_help_lists_the_keys_and_no_argument_asks_for_a_file(capsys):
    assert main(["--help"]) == 0 and "--head_lr" in capsys.readouterr().out
    assert main([]) == 2
    assert main(["--lr", "1e-3"]) == 2 and "--config FILE is missing" in capsys.readouterr().err


def test_a_mistake_in_the_data_names_file_and_line_before_a_model_is_loaded(config, tmp_path, capsys):
    path = config(model_name_or_path="a-hub/model-that-is-not-here")
    (tmp_path / "train.jsonl").write_text('{"query": "q", "hits": []}\n')
    assert main(["--config", path]) == 2
    assert f"error: {tmp_path / 'train.jsonl'}:1:" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_an_error_line(config, capsys):
    assert main(["--config", config(model_name_or_path="a-hub/model-that-is-not-here")]) == 2
    assert "error:" in capsys.readouterr().err


def test_a_contradiction_of_launcher_and_configuration_is_an_error_line(config, capsys, monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    assert main(["--config", config()]) == 2
    assert "error: mixed_precision is no in the configuration but bf16" in capsys.readouterr().err


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
    assert "already holds a run. Go on with it: --resume auto." in capsys.readouterr().err


def test_a_loss_that_is_not_finite_is_code_1_without_a_traceback(config, capsys):
    assert main(["--config", config("listwise_ce", lr=1e30, head_lr=1e30, max_grad_norm="None")]) == 1
    lines = errors(capsys)
    assert any(line.startswith("error: the ") and "no weight was changed by it" in line for line in lines)
    assert not any("Traceback" in line for line in lines)


def test_an_interruption_says_how_to_go_on(config, capsys, monkeypatch):
    from rag_retrieval.train.loop import Trainer

    def interrupt(self):
        raise KeyboardInterrupt

    monkeypatch.setattr(Trainer, "train", interrupt)
    assert main(["--config", config()]) == 130
    assert "error: interrupted; go on with --resume auto" in capsys.readouterr().err


def test_a_traceback_can_be_asked_for(config, monkeypatch):
    from rag_retrieval.train.reranker.run import StartError

    monkeypatch.setenv("RAG_RETRIEVAL_TRACEBACK", "1")
    with pytest.raises(StartError):
        main(["--config", config(model_name_or_path="a-hub/model-that-is-not-here")])


def test_other_processes_leave_the_message_to_the_first(monkeypatch, capsys):
    monkeypatch.setenv("RANK", "3")
    monkeypatch.setattr(train_reranker, "GRACE", 0.0)
    assert train_reranker.report(ValueError("wrong"), 2, on_all_processes=True) == 2
    assert not capsys.readouterr().err
    train_reranker.report(ValueError("wrong"), 2, on_all_processes=False)
    assert capsys.readouterr().err == "error in process 3: wrong\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [["rag_retrieval.cli", "train"], ["accelerate.commands.launch", "--cpu", SCRIPT]]
)
def test_the_command_trains_from_the_repository_root(config, tmp_path, command):
    done = launch([*command, "--config", config()])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run" / "model" / "model.safetensors").exists()
    assert "Traceback" not in done.stderr and "Warning" not in done.stderr, done.stderr


@pytest.mark.slow
def test_a_killed_process_resumes(config, tmp_path):
    """A real kill in the middle of a run, not an exception."""
    import signal
    import subprocess
    import sys
    import time

    path = config(epochs=400, save_steps=20, num_workers=2)
    program = [sys.executable, "-m", "rag_retrieval.cli", "train", "--config", path]
    process = subprocess.Popen(program, cwd=ROOT, env=os.environ, stderr=subprocess.DEVNULL)
    output_dir = tmp_path / "run"
    deadline = time.monotonic() + 120
    while not list(output_dir.glob("checkpoint-*")) and time.monotonic() < deadline:
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    reached = max(int(folder.name.split("-")[1]) for folder in Path(output_dir).glob("checkpoint-*"))
    assert main(["--config", path, "--resume", "auto", "--epochs", str(reached // 5 + 8)]) == 0
    assert read_metrics(output_dir, "train")[-1]["step"] == reached // 5 * 5 + 40
