"""The benchmark of losses over lexical weights and token vectors, on small inputs."""

import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import representation_losses as benchmark


@pytest.fixture(autouse=True)
def threads():
    """The benchmark sets one thread."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(capsys, monkeypatch, *arguments) -> list[str]:
    monkeypatch.setattr(sys, "argv", ["representation_losses.py", *arguments])
    benchmark.main()
    return capsys.readouterr().out.splitlines()


def test_maxsim_is_held_to_sentence_transformers_and_timed(capsys, monkeypatch):
    lines = run(capsys, monkeypatch, "speed", "--queries", "2", "--width", "8", "--rounds", "1")
    assert lines[1].startswith("2 queries of 32 vectors, 16 documents of ")
    sides = {line[:22].strip(): line[22:].split() for line in lines if "(" in line and " s " in line}
    assert {"rag_retrieval", "sentence-transformers"} <= sides.keys()
    assert sides["rag_retrieval"][2] == "1.00"


def test_a_side_with_other_gradients_is_not_timed(capsys, monkeypatch):
    monkeypatch.setattr(benchmark, "sentence_transformers_scores", lambda: lambda q, d, *_: (q.sum(1) @ d.sum(1).T))
    with pytest.raises(AssertionError, match="sentence-transformers"):
        run(capsys, monkeypatch, "speed", "--queries", "2", "--width", "8", "--rounds", "1")


@pytest.mark.slow
def test_memory_of_lexical_training_is_far_below_a_tensor_over_the_vocabulary(capsys, monkeypatch):
    sizes = ("--texts", "8", "--tokens", "256", "--vocabulary", "100000", "--hidden", "32", "--fitting", "1", "2")
    lines = run(capsys, monkeypatch, "memory", *sizes)
    own = float(next(line for line in lines if line.startswith("rag_retrieval")).split()[1].replace(",", ""))
    assert 0 < own < 0.1 * 8 * 256 * 100_000 * 4 / 2**20
