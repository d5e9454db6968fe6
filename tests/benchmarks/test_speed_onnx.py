import logging
import sys
from pathlib import Path

import numpy as np
import pytest

# the scripts import each other by bare name, as Python runs them
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import speed
import speed_onnx
from speed_works import Disagreement


def test_sides_alternate_in_reversed_order_after_an_untimed_call():
    order = []

    def side(name):
        return lambda: order.append(name) or np.zeros(1)

    seconds, scores = speed_onnx.take_turns({name: side(name) for name in "abc"}, 2)
    assert "".join(order) == "abc" + "abc" + "cba"
    assert [len(own) for own in seconds.values()] == [2, 2, 2] and list(scores) == ["a", "b", "c"]


def test_float32_sides_that_score_otherwise_are_refused_and_int8_may_differ():
    scores = {"torch": np.zeros(2), "ONNX": np.full(2, 9e-4), "ONNX int8": np.ones(2)}
    speed_onnx.check_agreement(scores)
    for wrong in (2e-3, float("nan")):
        with pytest.raises(Disagreement, match="OpenVINO and torch differ by"):
            speed_onnx.check_agreement(scores | {"OpenVINO": np.array([0, wrong])})


def test_a_result_is_a_table_with_a_row_for_each_side():
    spread = {"median": 10.0, "least": 9.0, "most": 11.0}
    side = {"pairs_per_second": spread, "times_torch": spread, "ndcg@10": 0.5, "largest_difference": 2e-6}
    sides = {"torch": side | {"file_bytes": None}, "ONNX": side | {"file_bytes": 92e6}}
    about = {"model": "m", "threads": 2, "rounds": 3, "pairs": 1000, "tokens_of_a_pair": 90.4, "data": "toy test"}
    printed = speed_onnx.describe_onnx(about | {"queries": 10, "depth": 100, "sides": sides})
    assert "3 rounds of 1,000 pairs of 90 tokens: toy test, 10 queries, 100 candidates each" in printed
    assert printed.splitlines()[-1].split() == [
        "ONNX",
        "10.0",
        "(9.0-11.0)",
        "10.00",
        "(9.00-11.00)",
        "0.5000",
        "2.0e-06",
        "92",
    ]


@pytest.fixture
def log_level_restored():
    logger = logging.getLogger("rag_retrieval")
    before = logger.level
    yield
    logger.setLevel(before)


@pytest.mark.usefixtures("log_level_restored")
def test_without_a_model_and_data_the_work_is_skipped(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(speed, "prepare_environment", lambda options: None)
    speed.main(["--work", "onnx", "--threads", "1", "--out", str(tmp_path / "out.jsonl")])
    assert "onnx: skipped, it needs --model" in capsys.readouterr().out
