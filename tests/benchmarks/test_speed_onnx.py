import sys
from pathlib import Path

import numpy as np
import pytest

# the scripts import each other by bare name, as Python runs them
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

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
