"""Ranges of activations: by hand, against the values themselves, and against a slow search for the entropy."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from rag_retrieval.export.calibrate import (  # noqa: E402
    BINS,
    CANDIDATE_STEP,
    KEPT_LEVELS,
    Histogram,
    activation_ranges,
    entropy_threshold,
)
from rag_retrieval.infer.onnx_folder import INPUTS  # noqa: E402
from rag_retrieval.models.pair_encoding import EncodedPair  # noqa: E402


def histogram(*parts: np.ndarray) -> Histogram:
    found = Histogram()
    for part in parts:
        found.add(np.asarray(part, np.float32))
    return found


def test_every_value_is_counted_once_however_the_range_grows():
    draw = np.random.default_rng(0)
    parts = [draw.normal(size=(3, 50)) * scale for scale in (1e-3, 1, 40, 0.1)] + [np.array([-5000.0])]
    found = histogram(*parts)
    values = np.concatenate([np.ravel(part) for part in parts]).astype(np.float32)
    edges = np.linspace(-found.limit, found.limit, BINS + 1)
    assert found.limit == 8192 * 2 ** round(np.log2(found.limit / 8192)) and found.limit >= 5000
    assert np.array_equal(found.counts, np.histogram(values, edges)[0])
    assert found.counts.sum() == len(values)


def test_max_covers_all_values_and_zero():
    assert histogram([1.5, -0.25], [3.0]).range("max", 99.0) == (-0.25, 3.0)
    assert histogram([2.0, 5.0]).range("max", 99.0) == (0.0, 5.0)
    assert histogram([0.0]).range("max", 99.0) == (0.0, 0.0)


def test_percentile_leaves_out_the_outermost_values_on_both_sides():
    # 1,000 values from -500 to 499; 98 percent leave out ten at each end. A bin is 1,024 / 4,096 wide
    values = np.arange(-500.0, 500)
    low, high = histogram(
        values,
    ).range("percentile", 98.0)
    assert low == pytest.approx(-490, abs=1) and high == pytest.approx(489, abs=1)
    assert histogram(values).range("percentile", 100.0) == (-500, 499), "all of them"
    one_outlier = np.append(np.linspace(0, 1, 9999), 1000)
    assert histogram(one_outlier).range("percentile", 99.9)[1] < 2 and histogram(one_outlier).range("max", 0)[1] == 1000


def slow_divergence(sizes: list[int], kept: int) -> float:
    """As the description of the method says, bin by bin."""
    p = [*sizes[: kept - 1], sizes[kept - 1] + sum(sizes[kept:])]
    starts = [int(kept * level / KEPT_LEVELS) for level in range(KEPT_LEVELS)] + [kept]
    q = [0.0] * kept
    for start, end in zip(starts, starts[1:], strict=False):
        filled = [place for place in range(start, end) if p[place] > 0]
        for place in filled:
            q[place] = sum(sizes[start:end]) / len(filled)
    total = sum(
        own / sum(p) * np.log(own / sum(p) / max(other / max(sum(q), 1), 1e-9))
        for own, other in zip(p, q, strict=True)
        if own
    )
    return float(total)


def test_the_entropy_threshold_is_that_of_the_least_divergence():
    draw = np.random.default_rng(1)
    sizes = np.histogram(np.abs(np.append(draw.normal(size=20_000), 9.9)), 400, (0, 10))[0]
    found = entropy_threshold(sizes)
    candidates = range(KEPT_LEVELS, len(sizes) + 1, CANDIDATE_STEP)
    assert found == min(candidates, key=lambda kept: slow_divergence(sizes.tolist(), kept))
    assert found < 300, "one value far out is not worth a coarser step for all"


def test_a_graph_s_activations_are_observed_text_by_text_without_padding(tmp_path):
    """embedding -> (+ 1) -> product: what goes into the product has the rows of the texts' tokens, and no other."""
    table = np.array([[100.0, 100], [-3, 0], [0, 7], [1, 1]], np.float32)  # row 0 is of the padding token
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"]),
        helper.make_node("Add", ["rows", "one"], ["x"]),
        helper.make_node("MatMul", ["x", "w"], ["y"]),
    ]
    initial = [("table", table), ("one", np.float32(1)), ("w", np.eye(2, dtype=np.float32))]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info(name, TensorProto.INT64, ["texts", "length"]) for name in INPUTS[:2]],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["texts", "length", 2])],
        [numpy_helper.from_array(np.asarray(value), name) for name, value in initial],
    )
    file = tmp_path / "model.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)
    texts = [EncodedPair(np.array(ids, np.int32), None, False, 0) for ids in ([1, 3, 3], [2])]
    ranges = activation_ranges(file, ["x"], texts, INPUTS[:2], "max", 100)
    assert ranges == {"x": (-2.0, 8.0)}
    assert [each.name for each in tmp_path.iterdir()] == ["model.onnx"], "the observed copy is gone"
