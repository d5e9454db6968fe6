"""int8 graphs of one product: steps and scales by hand, what stays in float32, and names of layers."""

import numpy as np
import pytest

onnx = pytest.importorskip("onnx")
pytest.importorskip("onnxruntime")

from onnx import TensorProto, helper, numpy_helper  # noqa: E402

from rag_retrieval.export.calibrate import Range  # noqa: E402
from rag_retrieval.export.quantize import SCOPES, layers_of, quantize_int8, static_scale  # noqa: E402
from rag_retrieval.infer.onnx_backend import open_session  # noqa: E402


def write_graph(file, nodes, constants: dict[str, np.ndarray], inputs: dict[str, tuple], output: tuple):
    kinds = {True: TensorProto.INT64, False: TensorProto.FLOAT}
    graph = helper.make_graph(
        nodes,
        "graph",
        [helper.make_tensor_value_info(name, kinds[name == "input_ids"], shape) for name, shape in inputs.items()],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, output)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10), file)


def product(tmp_path, weights: np.ndarray, ranges=None, **options):
    """A session of x times weights, quantized."""
    source, target = tmp_path / "float32.onnx", tmp_path / "int8.onnx"
    node = helper.make_node("MatMul", ["x", "w"], ["y"], "product")
    shapes = {"x": ["pairs", "tokens", len(weights)]}, ["pairs", "tokens", weights.shape[1]]
    write_graph(source, [node], {"w": weights}, *shapes)
    quantize_int8(source, target, {"product"}, ranges, **options)
    onnx.checker.check_model(onnx.load(target))
    return open_session(target, "cpu", 1)


def rounded_weights(weights: np.ndarray, axis=0) -> np.ndarray:
    scales = np.abs(weights).max(axis=axis) / 63
    return np.round(weights / scales) * scales


def test_every_token_is_rounded_by_its_own_largest_value(tmp_path):
    draw = np.random.default_rng(0)
    weights = draw.normal(size=(16, 8)).astype(np.float32)
    x = draw.normal(size=(3, 5, 16)).astype(np.float32)
    x[1, 2] *= 1000  # would leave one or two steps to all others, had they a scale in common
    x[2, 4] = 0
    (found,) = product(tmp_path, weights).run(None, {"x": x})
    steps = np.abs(x).max(axis=-1, keepdims=True) / 127
    rounded = np.round(np.divide(x, steps, out=np.zeros_like(x), where=steps > 0))
    np.testing.assert_allclose(found, rounded @ rounded_weights(weights) * steps, rtol=1e-3, atol=1e-3)
    assert np.array_equal(found[2, 4], np.zeros(8))
    assert np.abs(found - x @ weights).max(axis=-1)[0].max() < 0.2 < np.abs(found[0]).max()


def test_static_steps_cover_the_calibrated_range_and_cut_what_is_beyond(tmp_path):
    # 255 steps of 0.02 from -1 to 4.1: zero is the 50th
    ranges = {"x": Range(-1.0, 4.1)}
    assert static_scale(ranges["x"]) == (pytest.approx(0.02), 50)
    weights = np.eye(2, dtype=np.float32)
    x = np.array([[[0.0, 0.031], [4.1, 9.0], [-1.0, -8.0]]], np.float32)
    (found,) = product(tmp_path, weights, ranges).run(None, {"x": x})
    np.testing.assert_allclose(found, [[[0, 0.04], [4.1, 4.1], [-1, -1]]], atol=1e-6)


def test_scales_are_of_each_output_channel_or_of_all(tmp_path):
    weights = np.array([[100.0, 1.0], [-50.0, 0.3]], np.float32)
    x = np.array([[[127.0, 0], [0, 127]]], np.float32)  # steps of 1: only the weights are rounded
    (each,) = product(tmp_path, weights).run(None, {"x": x})
    np.testing.assert_allclose(each[0] / 127, rounded_weights(weights), rtol=1e-5)
    (one,) = product(tmp_path, weights, per_channel=False).run(None, {"x": x})
    np.testing.assert_allclose(one[0] / 127, rounded_weights(weights, axis=None), rtol=1e-5)
    assert one[0, 1, 1] == 0 != each[0, 1, 1], "0.3 is less than half a step of 100 / 63"


def test_a_product_with_a_bias_and_turned_weights_and_a_lookup(tmp_path):
    draw = np.random.default_rng(1)
    table, weights, bias = draw.normal(size=(5, 4)), draw.normal(size=(3, 4)), draw.normal(size=3)
    table[2] = 0
    nodes = [
        helper.make_node("Gather", ["table", "input_ids"], ["rows"], "lookup"),
        helper.make_node("Gemm", ["rows", "w", "b"], ["y"], "product", transB=1),
    ]
    constants = {"table": table, "w": weights, "b": bias}
    constants = {name: value.astype(np.float32) for name, value in constants.items()}
    write_graph(tmp_path / "a.onnx", nodes, constants, {"input_ids": ["texts"]}, ["texts", 3])
    model = onnx.load(tmp_path / "a.onnx")
    layers = layers_of(model, [])
    assert layers.nodes == {"lookup": ["lookup"], "product": ["product"]} and layers.inputs == {"product": "rows"}
    quantize_int8(tmp_path / "a.onnx", tmp_path / "b.onnx", {"lookup", "product"})
    ids = np.array([4, 2, 0])
    (found,) = open_session(tmp_path / "b.onnx", "cpu", 1).run(None, {"input_ids": ids})
    np.testing.assert_allclose(found, table[ids] @ weights.T + bias, atol=0.1)
    np.testing.assert_allclose(found[1], bias, rtol=1e-5)
    kinds = {value.name: value.data_type for value in onnx.load(tmp_path / "b.onnx").graph.initializer}
    assert not {"table", "w"} & kinds.keys(), "no weights are stored twice"
    small = [name for name, kind in kinds.items() if kind == TensorProto.INT8]
    assert {name.partition("/")[0] for name in small} == {"table", "w"}


def named(node, *modules: str):
    entry = node.metadata_props.add()
    entry.key, entry.value = SCOPES, str(["", *modules, "linear"])
    return node


def three_products(tmp_path):
    """x -> layer.0.dense -> layer.11.dense -> head -> y"""
    names = ("encoder.layer.0.dense", "encoder.layer.11.dense", "head")
    values = ["x", "a", "b", "y"]
    nodes = [
        named(
            helper.make_node("MatMul", [values[place], f"w{place}"], [values[place + 1]], f"n{place}"),
            f"model.model.{name}",
        )
        for place, name in enumerate(names)
    ]
    constants = {f"w{place}": np.eye(2, dtype=np.float32) for place in range(3)}
    write_graph(tmp_path / "model.onnx", nodes, constants, {"x": ["pairs", 2]}, ["pairs", 2])
    return layers_of(onnx.load(tmp_path / "model.onnx"), ["y"])


def test_layers_have_the_names_of_modules_and_the_head_is_none(tmp_path):
    layers = three_products(tmp_path)
    assert layers.nodes == {"encoder.layer.0.dense": ["n0"], "encoder.layer.11.dense": ["n1"]}
    assert layers.inputs == {"n0": "x", "n1": "a"}


def test_layers_are_excluded_by_name_and_by_pattern_from_any_dot_on(tmp_path):
    layers = three_products(tmp_path)
    for pattern in ("encoder.layer.11.*", "layer.11.dense", "layer.11.*", "*.11.*"):
        assert layers.matching([pattern]) == ["encoder.layer.11.dense"]
    assert layers.matching(["dense"]) == list(layers.nodes) and layers.matching([]) == []
    with pytest.raises(ValueError, match=r"'layer.12.\*'; the layers are encoder.layer.0.dense, encoder.layer.11.den"):
        layers.matching(["layer.11.*", "layer.12.*"])


def test_an_excluded_layer_stays_in_float32(tmp_path):
    layers = three_products(tmp_path)
    source, target = tmp_path / "model.onnx", tmp_path / "int8.onnx"
    quantize_int8(source, target, layers.nodes_without(["encoder.layer.11.dense"]))
    graph = onnx.load(target).graph
    kinds = {value.name: value.data_type for value in graph.initializer}
    products = {node.input[1]: node for node in graph.node if node.op_type == "MatMul"}
    assert products.keys() == {"w0/dequantized", "w1", "w2"} and kinds["w0/dequantized/int8"] == TensorProto.INT8
    assert kinds["w1"] == kinds["w2"] == TensorProto.FLOAT and products["w1"].name == "n1"
