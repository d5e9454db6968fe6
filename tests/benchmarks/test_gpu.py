"""`benchmarks/gpu.py`: its parts run on a CPU on tiny shapes, and one that fails or hangs takes nothing with it."""

import json
import logging
import sys
from pathlib import Path

import pytest
import torch

# the scripts import each other by bare name, as Python runs them
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu
import gpu_sections

TINY = ["--device", "cpu", "--tiny"]


@pytest.fixture
def restored():
    """What a section's process changes for itself."""
    ours, theirs = logging.getLogger("rag_retrieval"), logging.getLogger("transformers")
    levels, threads = (ours.level, theirs.level), torch.get_num_threads()
    yield
    for logger, level in zip((ours, theirs), levels, strict=True):
        logger.setLevel(level)
    torch.set_num_threads(threads)


@pytest.mark.slow
@pytest.mark.usefixtures("restored")
@pytest.mark.parametrize("section", gpu.SECTIONS)
def test_every_part_runs_on_a_cpu_on_tiny_shapes(tmp_path, section, monkeypatch):
    monkeypatch.setenv("RAG_RETRIEVAL_CACHE", str(tmp_path / "cache"))
    file = tmp_path / "section.json"
    assert gpu.main([*TINY, "--sections", section, "--section-file", str(file), "--out", str(tmp_path / "out")]) == 0
    parts = json.loads(file.read_text())["parts"]
    assert list(parts) == list(gpu_sections.PARTS[section])
    assert not {name: part["error"] for name, part in parts.items() if "error" in part}
    if section in ("encoder", "decoder"):
        assert all(part["our_ms"] > 0 and part["share_of_gemm_rate"] > 0 for part in parts.values())
    if section == "caching":
        assert parts["ours"]["seconds_of_step"] > 0 < parts["sentence-transformers"]["seconds_of_step"]
        assert parts["the same step"]["cached_loss"] == pytest.approx(parts["the same step"]["loss"], rel=1e-4)
    if section == "checks":
        assert parts["out of memory"]["fitting_tokens"] <= 100 and parts["fp16 scaler"]["skipped"] == 0


def child(code: str):
    """What a section's process runs in place of its parts. {file}: where its results are expected."""
    return lambda name, options, file: [sys.executable, "-c", code.format(file=str(file))]


FINE = """open({file!r}, "w").write('{{"parts": {{"one": {{"figure": 1.5}}}}}}')"""


def test_a_section_that_fails_or_hangs_leaves_the_others_and_what_it_had_found(tmp_path, monkeypatch, capsys):
    codes = {
        "attention": FINE + "; import sys; sys.exit('no kernel image')",
        "encoder": FINE + "; import time; time.sleep(600)",
        "decoder": FINE,
    }
    monkeypatch.setattr(gpu, "command_of", lambda name, *more: child(codes[name])(name, *more))
    monkeypatch.setattr(gpu, "SECTIONS", gpu.SECTIONS | {"encoder": 3.0})
    assert gpu.main([*TINY, "--sections", *codes, "--out", str(tmp_path / "gpu.json")]) == 1
    result = json.loads((tmp_path / "gpu.json").read_text())
    found = result["sections"]
    parts = {"one": {"figure": 1.5}}
    assert found["attention"]["parts"] == found["decoder"]["parts"] == parts
    assert found["encoder"]["parts"] in (parts, {})  # on a busy machine Python may take seconds to start
    assert found["attention"]["error"] == "exit code 1: no kernel image\n"
    assert found["encoder"]["error"] == "stopped after its 3 seconds" and "error" not in found["decoder"]
    assert result["machine"]["cores"] and result["versions"]["torch"] and "--tiny" in result["command"]
    assert [path.name for path in tmp_path.iterdir()] == ["gpu.json"]
    assert "one: figure 1.5" in capsys.readouterr().out


def test_an_error_of_a_part_leaves_the_others(tmp_path, monkeypatch):
    def fail(options):
        raise RuntimeError("vectors differ")

    parts = {"wrong": fail, "right": lambda options: {"figure": 2}}
    monkeypatch.setattr(gpu_sections, "PARTS", {"checks": parts})
    file = tmp_path / "section.json"
    assert gpu.main([*TINY, "--sections", "checks", "--section-file", str(file), "--out", str(tmp_path / "out")]) == 0
    found = json.loads(file.read_text())["parts"]
    assert found["wrong"]["error"] == "RuntimeError: vectors differ" and found["right"]["figure"] == 2


def test_sections_get_no_more_than_what_is_left_and_all_end_within_eight_minutes(tmp_path, monkeypatch):
    assert sum(gpu.SECTIONS.values()) <= gpu.TOTAL < 480
    monkeypatch.setattr(gpu, "command_of", child("raise SystemExit('never started')"))
    assert gpu.main([*TINY, "--sections", "checks", "--seconds", "0", "--out", str(tmp_path / "gpu.json")]) == 1
    found = json.loads((tmp_path / "gpu.json").read_text())["sections"]["checks"]
    assert found == {"error": "not started: no time was left"}
