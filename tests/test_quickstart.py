"""The quickstart: from an installed wheel, in an empty folder; and what it does not touch."""

import importlib.metadata
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from rag_retrieval.cli import main
from rag_retrieval.data.store import Group
from rag_retrieval.quickstart import examples

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("rag_retrieval", "example_data", "pyproject.toml", "setup.py", "README.md", "LICENSE")


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """A folder that has the package as a wheel installs it, built from a copy of the sources; a third of the test
    queries are left in it, since scoring takes longer than training."""
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("target")
    for name in SOURCES:
        path = ROOT / name
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, source / name)
    held_out = source / "example_data" / "stdlib_grouped.test.jsonl"
    with held_out.open(encoding="utf-8") as file:
        kept = list(file)[::3]
    held_out.write_text("".join(kept), encoding="utf-8")
    arguments = ["--quiet", "--no-deps", "--target", str(target), str(source)]
    if int(importlib.metadata.version("setuptools").split(".")[0]) >= 77:
        arguments.insert(0, "--no-build-isolation")  # nothing to download
    done = subprocess.run([sys.executable, "-m", "pip", "install", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.mark.slow
def test_an_installed_wheel_runs_it_in_any_folder_and_continues_what_was_interrupted(installed, tmp_path):
    # one thread: two that wait for each other on a busy machine took five times the CPU time
    environment = os.environ | {"PYTHONPATH": str(installed), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    where = "import rag_retrieval; print(rag_retrieval.__file__)"
    found = subprocess.run([sys.executable, "-c", where], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert found.stdout.strip() == str(installed / "rag_retrieval" / "__init__.py")
    command = [sys.executable, "-m", "rag_retrieval.cli", "quickstart", "--share", "0.5"]  # for time's sake
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True) as interrupted:
        for line in interrupted.stderr:
            if " step 20/" in line:
                interrupted.send_signal(signal.SIGINT)
    assert interrupted.returncode == 130
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stderr
    assert " step 20/" not in done.stderr and " step 40/" in done.stderr
    rows = dict(re.findall(r"^  (\S.*?)\s{2,}(0\.\d{4})\s+0\.\d{4}$", done.stdout, flags=re.MULTILINE))
    assert list(rows) == ["BM25's order", "the base's embeddings, cosine", "the trained reranker"]
    assert "67 held-out queries" in done.stdout
    assert float(rows["the trained reranker"]) >= float(rows["BM25's order"]) + 0.05
    assert done.stdout.count("query: ") == 3 and "runs/quickstart/model" in done.stdout
    assert (tmp_path / "runs" / "quickstart" / "model" / "config.json").is_file()


@pytest.mark.slow
def test_a_wheel_has_every_file_that_the_package_reads(installed):
    package = ROOT / "rag_retrieval"
    files = [path for pattern in ("*.py", "*.json", "*.yaml") for path in package.rglob(pattern)]
    shipped = [path.relative_to(package) for path in files if not {"runs", "output", "logs"} & set(path.parts)]
    assert Path("models/known_prompts.json") in shipped
    assert [name for name in shipped if not (installed / "rag_retrieval" / name).is_file()] == []


def test_a_folder_that_holds_anything_is_left_as_it_is(tmp_path, capsys):
    kept = tmp_path / "model" / "config.json"
    kept.parent.mkdir()
    kept.write_text("of another run")
    assert main(["quickstart", "--output_dir", str(tmp_path)]) == 2
    message = capsys.readouterr().err
    assert str(tmp_path) in message and "--output_dir" in message
    assert list(tmp_path.rglob("*")) == [kept.parent, kept] and kept.read_text() == "of another run"


def test_its_rankings_fit_80_columns():
    labels = np.array([1.0, 0.0])
    group = Group("q", ["word " * 40, "a"], labels, labels > 0, np.array([1, 2]))
    lines = list(examples([labels] * 2, [labels] * 2, [group] * 2))
    assert max(map(len, lines)) in range(70, 81)
