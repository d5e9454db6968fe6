"""All commands as processes: help, mistakes, signals, and environments in which something is missing."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from rag_retrieval import cli
from rag_retrieval.core.command import load_object
from rag_retrieval.train.script import TRAINERS

ROOT = Path(__file__).resolve().parents[1]
VALID = {  # options with which each command would begin its work
    "train": "--model_name_or_path o/m --model_type bert_encoder --train_dataset o/d --loss_type point_ce "
    "--output_dir out",
    "evaluate": "--model o/m --data .",
    "index": "--corpus . --output out",
    "mteb": "--model o/m --tasks SciFact",
    "search": "--index . --query q",
    "fit-fusion": "--index . --data .",
    "mine": "--data . --output o.jsonl",
    "distill": "--dataset o/d --teachers o/m --output o.jsonl",
    "export": "--model o/m --output out",
    "benchmark": "--model o/m",
    "serve": "--model o/m",
    "push": "--model . --repo_id o/m",
    "quickstart": "",
}


def start(command: str, folder: Path, before: str = "", after: str = "", **changes: str) -> subprocess.Popen:
    """`python command` after and before other words of a shell, which can close streams and remove folders. Modules in
    `folder` come first."""
    path = os.pathsep.join(map(str, (folder, ROOT, ROOT / "tests")))
    settings = {"PATH": os.environ["PATH"], "HOME": str(folder), "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"} | changes
    line = f"{before} exec {sys.executable} {command} {after}"
    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    return subprocess.Popen(["bash", "-c", line], cwd=folder, env=settings, text=True, **streams)


def started(name: str, options: str, folder: Path, **words: str) -> subprocess.Popen:
    return start(f"-m rag_retrieval.cli {name} {options}", folder, **words)


def finish(process: subprocess.Popen) -> tuple[int, str, str]:
    """Exit code, stdout, stderr."""
    out, err = process.communicate(timeout=600)
    assert "Traceback" not in err and "Exception ignored" not in err, err
    return process.returncode, out, err


def test_every_command_is_in_the_help_and_its_help_fits_a_screen(capsys):
    assert cli.main(["--help"]) == 0
    printed = capsys.readouterr().out
    assert VALID.keys() == cli.COMMANDS.keys() and all(f"\n  {name} " in printed for name in cli.COMMANDS)
    assert max(map(len, printed.splitlines())) <= 80
    commands = {(name,): command for name, command in cli.COMMANDS.items()}
    commands |= {("train", "--task", task): trainer for task, trainer in TRAINERS.items()}
    for name, command in commands.items():
        keys = load_object(command.config).model_fields
        assert len(load_object(command.config).main_keys) == min(5, len(keys))
        assert cli.main([*name, "--help"]) == 0
        printed = capsys.readouterr().out
        assert len(printed.splitlines()) <= 50 and max(map(len, printed.splitlines())) <= 80
        words = set(printed.replace(",", " ").replace("--", " ").split())
        assert not keys.keys() - words and not re.search(r":\n+(?! )", printed), "a heading has something below it"
        for option in ("--help_all", "--help-all"):
            assert cli.main([*name, option]) == 0
            printed = capsys.readouterr().out
            assert not {f"--{key}" for key in keys} - set(printed.split())
            assert max(map(len, printed.splitlines())) <= 80


def test_every_command_takes_a_file_and_its_options_are_spelt_alike(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "wrong.yaml").write_text("no_such_key: 1\n")
    for name in cli.COMMANDS:
        for option in ("--config=wrong.yaml", "--no-such-key=1", "--no_such_key"):
            assert cli.main([name, option]) == 2
            assert "no" in (error := capsys.readouterr().err) and "unknown key" in error


def test_a_command_without_options_says_what_is_missing(capsys):
    for name in cli.COMMANDS.keys() - {"quickstart"}:
        assert cli.main([name]) == 2
        shown = capsys.readouterr()
        assert shown.err.startswith("error: --") and "is missing" in shown.err and not shown.out


def test_an_unknown_command_is_a_mistake(capsys):
    assert cli.main(["trian"]) == 2
    assert "error: unknown command 'trian'" in capsys.readouterr().err
    assert cli.main([]) == 2
    assert "error: a command is missing" in capsys.readouterr().err


@pytest.mark.slow
def test_a_stdout_that_is_full_closed_or_not_read_leaves_no_traceback(tmp_path):
    for name in cli.COMMANDS.keys() - {"quickstart"}:
        full, closed = (started(name, "--help", tmp_path, after=word) for word in ("> /dev/full", ">&-"))
        code, _, err = finish(full)
        assert code == 1 and err.startswith("error: stdout: No space left on device") and err.count("\n") == 1
        assert finish(closed) == (0, "", "")
    assert finish(started("", "--help", tmp_path, after=">&-")) == (0, "", "")
    assert finish(started("trian", "", tmp_path, after="2>&-"))[0] == 2
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "rag_retrieval.cli", "train", "--help"]
    done = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, timeout=600)
    os.close(writing)
    assert (done.returncode, done.stderr) == (128 + signal.SIGPIPE, b"")


def test_the_work_is_done_whatever_becomes_of_its_text(tmp_path):
    (tmp_path / "answer.py").write_text(
        "import sys\nfrom pathlib import Path\nfrom rag_retrieval.core.command import Command, run_command\n"
        "def answer(config):\n    Path(config.output_dir).write_text('done')\n    return '\u718a\u732b'\n"
        "if __name__ == '__main__':\n"
        "    command = Command('answer', 'answer', config='core.config_samples:Sample', run='answer:answer')\n"
        "    sys.exit(run_command(command, ['--model', 'm', '--output_dir', sys.argv[1]]))\n",
        encoding="utf-8",
    )
    for after, environment, code, text in (
        (">&-", {}, 0, ""),
        ("2>&-", {"PYTHONUTF8": "1"}, 0, "\u718a\u732b\n"),
        ("> /dev/full", {}, 1, ""),
        ("", {"PYTHONIOENCODING": "ascii"}, 0, "\\u718a\\u732b\n"),
        ("", {"PYTHONIOENCODING": "latin-1"}, 0, "\\u718a\\u732b\n"),
    ):
        done = finish(start("answer.py output", tmp_path, after=after, **environment))
        assert done[:2] == (code, text) and bool(done[2]) == bool(code)
        assert (tmp_path / "output").read_text() == "done"
        (tmp_path / "output").unlink()


@pytest.mark.slow
def test_a_signal_during_imports_is_one_line_and_the_shells_exit_code(tmp_path):
    """Libraries that never finish their import stand in for slow ones."""
    for library in ("numpy", "torch", "huggingface_hub"):
        (tmp_path / f"{library}.py").write_text("import sys, time\nsys.stderr.write('waiting\\n')\ntime.sleep(300)\n")
    for number in (signal.SIGINT, signal.SIGTERM):
        for name, options in VALID.items():
            process = started(name, options, tmp_path)
            assert process.stderr.readline() == "waiting\n", name
            process.send_signal(number)
            assert finish(process) == (128 + number, "", f"error: interrupted by {number.name}\n"), name


@pytest.mark.slow
def test_rank_without_a_group_is_not_read(tmp_path):
    for name in cli.COMMANDS.keys() - {"quickstart"}:  # which loads torch first
        code, _, err = finish(started(name, "--no_such_key 1", tmp_path, RANK="1"))
        assert code == 2 and err.startswith("error: --no_such_key"), name


@pytest.mark.slow
def test_a_deleted_current_folder_is_one_line(tmp_path):
    for name, options in VALID.items():
        (tmp_path / name).mkdir()
        code, _, err = finish(started(name, options, tmp_path, before=f"cd {name} && rmdir ../{name} &&"))
        assert code == 2 and err.count("\n") == 1 and "current folder" in err, name


@pytest.mark.slow
def test_a_user_without_a_home_gets_one_line_with_the_remedy(tmp_path):
    """As in a container that runs under a user id of its own: neither HOME nor an entry in the list of users."""
    (tmp_path / "sitecustomize.py").write_text(
        "import pwd\ndef getpwuid(number):\n    raise KeyError('uid not found')\npwd.getpwuid = getpwuid\n"
    )
    (tmp_path / "data.jsonl").write_text('{"query": "q", "pos": ["p"], "neg": ["n"]}\n' * 2)
    for name in ("train", "evaluate", "distill", "export", "serve"):  # the others need no cache
        options = VALID[name].replace("o/d", "data.jsonl").replace("--data .", "--data data.jsonl")
        code, _, err = finish(started(name, options, tmp_path, before="unset HOME;"))
        *_, error = err.splitlines()
        assert code == 2 and error.startswith("error: ") and "RAG_RETRIEVAL_CACHE" in error, (name, err)
