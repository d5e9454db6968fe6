"""The fault harness: what it plans, and a few faults for real."""

import random
import subprocess
import sys

import pytest
from training_runs import ROOT

sys.path.insert(0, str(ROOT / "benchmarks"))

import faults  # noqa: E402
from fault_runs import Fault, Outcome  # noqa: E402


def test_thirty_kills_or_more_reach_every_phase_of_both_launches():
    planned = list(faults.kills(random.Random(0)))
    assert len(planned) >= 30
    for processes in (1, 2):
        phases = {case.fault.phase for case in planned if case.processes == processes}
        assert phases == {"step", "saving", "rotation", "evaluation", "the end"}
    assert {case.fault.ranks for case in planned if case.fault.do == "kill one"} == {(0,), (1,)}
    assert any(case.fault.do == "kill all" for case in planned)
    first, same, other = (list(faults.all_cases(random.Random(seed))) for seed in (1, 1, 2))
    assert first == same != other


def test_an_expected_end_has_its_code_message_and_time():
    cases = [
        (1, "stopped by SIGTERM", False, 3.0, True),
        (0, "stopped by SIGTERM", False, 3.0, False),
        (1, "Killed", False, 3.0, False),
        (1, "stopped by SIGTERM", True, 3.0, False),
        (1, "stopped by SIGTERM", False, 61.0, False),
    ]
    case = faults.Case("a row", 1, Fault("SIGTERM to one"), says="stopped by SIGTERM")
    for code, log, hung, seconds, right in cases:
        assert faults.ended_as_expected(case, Outcome(code, seconds, log, hung), within=60) == right


@pytest.mark.parametrize(("how", "size"), [("truncate", 500), ("unlink", None)])
def test_the_largest_file_of_the_newest_checkpoint_is_damaged(tmp_path, how, size):
    for step, content in ((9, b"x" * 1000), (10, b"y" * 1000)):
        (tmp_path / f"checkpoint-{step}").mkdir()
        (tmp_path / f"checkpoint-{step}" / "weights").write_bytes(content)
        (tmp_path / f"checkpoint-{step}" / "small").write_bytes(b"z")
    faults.spoil(tmp_path, how)
    damaged = tmp_path / "checkpoint-10" / "weights"
    assert (damaged.stat().st_size if damaged.exists() else None) == size
    assert not damaged.exists() or damaged.read_bytes() != b"y" * 1000
    assert (tmp_path / "checkpoint-9" / "weights").read_bytes() == b"x" * 1000


@pytest.mark.slow
@pytest.mark.parametrize("task", ["reranker", "unified"])  # what hurts unified training hurts a dense vector's alone
def test_a_few_real_faults_end_as_expected_and_resume_to_equal_weights(task):
    program = [sys.executable, "benchmarks/faults.py", "--task", task, "--quick", "--within", "600"]
    done = subprocess.run(program, cwd=ROOT, capture_output=True, text=True, timeout=1400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 faults, 6 of them ended with the weights of the run without them" in done.stdout
