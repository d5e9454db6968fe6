"""The command `benchmark`: what its table and its JSON hold. Nothing here depends on how long anything takes."""

import json
import subprocess
import sys

import pytest

pytest.importorskip("onnxscript")
pytest.importorskip("onnxruntime")

from embedder_samples import FAMILIES  # noqa: E402
from exported_samples import exported  # noqa: E402

from rag_retrieval.cli import main  # noqa: E402
from rag_retrieval.infer import benchmark  # noqa: E402
from rag_retrieval.infer.benchmark import BenchmarkConfig, Subject, describe, texts_of, timed_calls, turns  # noqa: E402
from rag_retrieval.models.embedder import EmbeddingModel  # noqa: E402

OPTIONS = ("--lengths", "16,4096", "--batch_sizes", "1,3", "--seconds", "1e-6", "--rounds", "2", "--documents", "2")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """An embedder of torch, and its export."""
    root = tmp_path_factory.mktemp("models")
    model = EmbeddingModel.from_pretrained(FAMILIES["bert"](root / "base"), max_length=64)
    model.save_pretrained(root / "model")
    return [str(root / "model"), str(exported(root / "model", root / "onnx"))]


@pytest.fixture
def in_this_process(monkeypatch):
    monkeypatch.setattr(benchmark, "in_own_process", lambda function, *arguments: function(*arguments))


@pytest.mark.slow
def test_models_of_torch_and_exports_are_measured_side_by_side(folders, in_this_process, tmp_path, capsys):
    output = tmp_path / "speed.json"
    command = ["benchmark", "--model", ",".join(folders), *OPTIONS, "--device", "cpu", "--output", str(output)]
    assert main(command) == 0
    result = json.loads(output.read_text())
    assert result["unit"] == "texts" and result["machine"]["versions"]["onnxruntime"]
    assert [model["runtime"] for model in result["models"]] == ["torch", "ONNX Runtime"]
    assert all(model["size"] > 10_000 and model["memory"] >= 0 for model in result["models"])
    cells = [(row["model"], row["batch_size"]) for row in result["throughput"]]
    assert cells == [(0, 1), (1, 1), (0, 3), (1, 3)], "4,096 tokens are more than the model reads"
    for row in result["throughput"]:
        assert 10 <= row["tokens"] <= 16
        assert row["tokens_per_second"] == pytest.approx(row["tokens"] * row["per_second"])
        assert 0 < row["range"][0] <= row["per_second"] <= row["range"][1]
    for own in result["latency"]:
        assert own["queries"] == 2 and 0 < own["p50"] <= own["p99"]
    printed = capsys.readouterr().out
    assert "texts a second" in printed and "times [1]" in printed and "[2] onnx (ONNX Runtime float32)" in printed


def test_a_reranker_has_pairs_a_second_and_no_ratio_alone(model_folders, in_this_process, capsys):
    assert main(["benchmark", "--model", model_folders["bert"], *OPTIONS, "--device", "cpu"]) == 0
    printed = capsys.readouterr().out
    assert "pairs a second" in printed and "times [1]" not in printed


def test_models_of_different_kinds_are_refused(folders, model_folders, in_this_process, capsys):
    command = ["benchmark", "--model", f"{folders[0]},{model_folders['bert']}", *OPTIONS, "--device", "cpu"]
    assert main(command) == 2
    assert "is an embedder" in (error := capsys.readouterr().err) and "is a reranker; give models of one kind" in error


def test_texts_fill_the_tokens_and_differ(folders):
    subject = Subject(folders[1], None, None)
    for tokens in (16, 64):
        texts = texts_of(subject, tokens, 4)
        encoded = subject.encoded(texts)
        # a word of the tiny tokenizer has several tokens
        assert all(tokens - 6 < len(text) <= tokens and not text.truncated for text in encoded)
        assert len(set(texts)) == 4


def test_every_other_round_is_in_reversed_order_and_a_turn_is_one_call_at_least():
    subjects = ["a", "b", "c"]
    assert [place for place, _ in turns(subjects, 3)] == [0, 1, 2, 2, 1, 0, 0, 1, 2]
    calls = []
    assert len(timed_calls(calls.append, 1e-9)) == 1 and calls == [0]


def test_ratios_are_to_the_first_model():
    rows = [
        {"model": place, "tokens": 16.0, "batch_size": 8, "per_second": rate, "tokens_per_second": 16 * rate}
        for place, rate in enumerate((50.0, 125.0))
    ]
    models = [{"name": name, "folder": name, "memory": 2e6, "size": 1.5e6} for name in ("one", "two")]
    times = [{"queries": 3, "p50": 1.25, "p99": 2.0}] * 2
    machine = {"processor": "a CPU", "threads": 2, "versions": {"python": "3.11"}}
    result = {"machine": machine, "unit": "texts", "models": models, "throughput": rows, "latency": times}
    table = {tuple(line.split()) for line in describe(result).splitlines()}
    assert ("[2]", "16", "8", "125.0", "2,000", "2.50") in table
    assert ("[1]", "1.2", "ms", "2.0", "ms", "3", "2", "MB", "1.5", "MB") in table


@pytest.mark.slow
def test_memory_is_that_of_a_process_of_its_own_and_an_export_needs_no_torch(folders):
    config = BenchmarkConfig(model=[folders[1]], lengths=[16], batch_sizes=[1])
    measured = benchmark.in_own_process(benchmark.memory_of, folders[1], None, config)
    assert 0 < measured["memory"] < 1 << 30
    code = (
        "import sys\nfrom rag_retrieval.infer import benchmark\n"
        f"benchmark.memory_of({folders[1]!r}, None, benchmark.BenchmarkConfig(model=['m'], lengths=[16]))\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
