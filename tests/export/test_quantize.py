"""Scales for each token: the product by hand, and no token's scale on another's values."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from rag_retrieval.export.quantize import scale_by_token  # noqa: E402
from rag_retrieval.infer.onnx_backend import open_session  # noqa: E402


def session_of(tmp_path, weights: np.ndarray, scales: np.ndarray):
    """x times weights, as ONNX Runtime's quantizer writes it, then rewritten."""
    nodes = [
        helper.make_node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]),
        helper.make_node("Mul", ["s", "w_scale"], ["both"]),
        helper.make_node("MatMulInteger", ["q", "w", "z"], ["sums"]),
        helper.make_node("Cast", ["sums"], ["floats"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["floats", "both"], ["y"]),
    ]
    values = [
        helper.make_tensor_value_info(name, TensorProto.FLOAT, ["pairs", "tokens", width])
        for name, width in (("x", weights.shape[0]), ("y", weights.shape[1]))
    ]
    initial = [numpy_helper.from_array(weights, "w"), numpy_helper.from_array(scales, "w_scale")]
    graph = helper.make_graph(nodes, "product", values[:1], values[1:], initial)
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=10)
    scale_by_token(model)
    onnx.checker.check_model(model)
    onnx.save(model, tmp_path / "model.onnx")
    return open_session(tmp_path / "model.onnx", "cpu", 1)


def test_every_token_is_rounded_by_its_own_largest_value(tmp_path):
    draw = np.random.default_rng(0)
    weights = draw.integers(-63, 64, (16, 8)).astype(np.int8)
    scales = draw.uniform(0.01, 0.02, 8).astype(np.float32)
    x = draw.normal(size=(3, 5, 16)).astype(np.float32)
    x[1, 2] *= 1000  # would leave one or two steps to all others, had they a scale in common
    x[2, 4] = 0
    (found,) = session_of(tmp_path, weights, scales).run(None, {"x": x})
    steps = np.abs(x).max(axis=-1, keepdims=True) / 127
    rounded = np.round(np.divide(x, steps, out=np.zeros_like(x), where=steps > 0))
    np.testing.assert_allclose(found, rounded @ (weights * scales) * steps, rtol=1e-4, atol=1e-4)
    assert np.array_equal(found[2, 4], np.zeros(8))
    exact = x @ (weights * scales)
    assert np.abs(found - exact).max(axis=-1)[0].max() < 0.05 < np.abs(exact[0]).max()
