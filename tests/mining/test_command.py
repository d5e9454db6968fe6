import os
import signal
import subprocess
import sys
import time

import pytest
from mining_samples import animal_data, read_output
from tiny_models import tiny_bert
from training_runs import ROOT, engine_command, launch

from rag_retrieval.cli import main


def test_mining_from_yaml_prints_what_was_kept_and_dropped(tmp_path, capsys):
    animal_data(tmp_path / "data")
    (tmp_path / "mine.yaml").write_text("data: data\noutput: nowhere.jsonl\nnum_negatives: 3\nlast_rank: 10\n")
    output = tmp_path / "out.jsonl"
    assert main(["mine", "--config", str(tmp_path / "mine.yaml"), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    assert printed.startswith(f"{output}: 36 lines in ")
    assert "   36  queries with 36 positives\n" in printed and "  360  candidates from 36 documents\n" in printed
    assert len(read_output(output)) == 36


def test_rank_of_a_cluster_without_a_group_changes_nothing(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    animal_data(tmp_path / "data")
    output = tmp_path / "out.jsonl"
    options = ["--data", str(tmp_path / "data"), "--num_negatives", "3", "--last_rank", "10"]
    assert main(["mine", *options, "--output", str(output)]) == 0
    assert capsys.readouterr().out.startswith(f"{output}: 36 lines") and output.exists()
    assert main(["mine", *options, "--output", str(output)]) == 2
    assert capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize(
    "options, message",
    [
        (["--data", "nowhere", "--output", "o.jsonl"], "error: --data: found no file or folder nowhere"),
        (["--data", ".", "--output", "o.jsonl"], "found neither corpus.jsonl nor corpus.jsonl.gz"),
        (["--config"], "error: --config: needs a value; expected a YAML file"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(tmp_path, monkeypatch, capsys, options, message):
    monkeypatch.chdir(tmp_path)
    assert main(["mine", *options]) == 2
    assert message in capsys.readouterr().err


def test_help_lists_the_keys_and_nothing_at_all_is_a_mistake(capsys):
    assert main(["mine", "--help"]) == 0
    assert "--num_negatives " in capsys.readouterr().out
    assert main(["mine"]) == 2


PART = 2  # queries


# a run that waits in its fourth part, to be killed
HELD = f"""
import sys, time
from rag_retrieval.cli import main
from rag_retrieval.mining import run
run.PART, parts, mine = {PART}, [], run.Miner.mine
def held_mine(self, part):
    if len(parts) == 3:
        time.sleep(300)
    parts.append(part)
    return mine(self, part)
run.Miner.mine = held_mine
sys.exit(main(sys.argv[1:]))
"""


@pytest.mark.slow
def test_a_run_ended_by_a_signal_continues_to_the_same_bytes(tmp_path, model_folders, monkeypatch):
    monkeypatch.setattr("rag_retrieval.mining.run.PART", PART)
    animal_data(tmp_path / "data")
    options = ["--data", str(tmp_path / "data"), "--reranker", model_folders["bert"], "--last_rank", "30", "--output"]
    assert main(["mine", *options, str(tmp_path / "whole.jsonl")]) == 0
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGKILL):
        output = tmp_path / f"{number.name}.jsonl"
        command = ["mine", *options, str(output)]
        run = subprocess.Popen([sys.executable, "-c", HELD, *command], env=environment, stderr=subprocess.PIPE)
        work = output.with_name(output.name + ".work")
        while len(list(work.glob("parts-*/shard-*"))) < 3:
            assert run.poll() is None, run.stderr.read()
            time.sleep(0.01)
        run.send_signal(number)
        errors = run.communicate(timeout=600)[1].decode()
        assert run.returncode == (-9 if number == signal.SIGKILL else 128 + number)
        if number != signal.SIGKILL:
            assert "the same command continues where this one stopped" in errors
        assert not output.exists()
        assert len(list(work.glob("parts-*/shard-*"))) == 3
        assert main(command) == 0
        assert output.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()


@pytest.mark.slow
def test_two_processes_mine_the_bytes_of_one_and_one_of_them_tells(tmp_path):
    animal_data(tmp_path / "data")
    base = tiny_bert(tmp_path / "bert")
    options = ["--data", str(tmp_path / "data"), "--candidates", "fused", "--dense_model", base, "--output"]
    assert main(["mine", *options, str(tmp_path / "one.jsonl")]) == 0
    two = ["rag_retrieval.cli", "mine", *options, str(tmp_path / "two.jsonl")]
    done = launch([*engine_command("config/ddp.yaml", 2, "-m"), *two])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "two.jsonl").read_bytes() == (tmp_path / "one.jsonl").read_bytes()
    assert done.stdout.count("two.jsonl: 36 lines") == 1 and not list(tmp_path.glob("*.work"))
