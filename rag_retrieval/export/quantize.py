"""int8: weights and word embeddings in 8 bits, activations put into 8 bits while the graph runs, a scale for each
token.

Heads stay in float32: a score head is a product of a few thousand numbers, costs nothing, and 8 bits there would make
documents tie.

ONNX Runtime's quantizer writes DynamicQuantizeLinear, which scales by the largest value of a whole batch: a score then
depends on the pairs that it is computed with (by up to 0.3 on a MiniLM). With a scale for each token it does not, and
the scores are nearer to float32 (rank correlation 0.995 against 0.988), for 5 percent of the speed.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import onnx
from onnx import NodeProto, helper, numpy_helper

from rag_retrieval.export.onnx_graph import EXTERNAL_FROM, beside, last_products, quiet

# symmetric: 1 to 255 around 128, which is zero; an all-zero token keeps a scale above 0
ZERO, STEPS, LEAST = np.uint8(128), 127, np.float32(1e-20)
CONSTANTS = {
    "token_last_axis": np.array([-1], np.int64),
    "token_least": np.array(LEAST),
    "token_step": np.array(np.float32(1 / STEPS)),
    "token_one": np.array(np.float32(1)),
    "token_zero": np.array(ZERO),
}


def quantize_int8(source: Path, target: Path, heads: Sequence[str]) -> None:
    """Write `target`: signed weights with a scale for each output channel, activations with one for each token.

    heads: outputs whose last products stay in float32.

    Weights take 7 of their 8 bits. On x86 processors without VNNI the sum of two full products overflows 16 bits, and
    the scores would be others there than on the machine where they were checked; measured on a MiniLM, the eighth bit
    is worth nothing (rank correlation with float32 0.992 with it, 0.993 without).
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    weight_bytes = sum(file.stat().st_size for file in (source, beside(source)) if file.is_file())
    products = last_products(model, *heads)
    lookups = [node for node in model.graph.node if node.op_type == "Gather"]
    other_lookups = [node.name for node in lookups if node.input[1] != "input_ids"]  # not of a token's embedding
    # a Gemm is first made a MatMul, under this new name
    kept = [*products, *(f"{name}_MatMul" for name in products), *other_lookups]
    del model.graph.value_info[:]  # shapes of products that are about to be turned round
    with quiet():
        quantize_dynamic(
            model,
            target,
            op_types_to_quantize=["MatMul", "Gather"],
            per_channel=True,
            reduce_range=True,
            weight_type=QuantType.QInt8,
            nodes_to_exclude=kept,
            use_external_data_format=weight_bytes >= EXTERNAL_FROM,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of what fused nodes give
        )
    quantized = onnx.load(target)
    scale_by_token(quantized)
    external = beside(target).is_file()
    beside(target).unlink(missing_ok=True)
    onnx.save(quantized, target, save_as_external_data=external, location=beside(target).name)


def scale_by_token(model: onnx.ModelProto) -> None:
    """Change a graph of ONNX Runtime's dynamic quantization in place."""
    nodes = model.graph.node
    scales = {node.output[1] for node in nodes if node.op_type == "DynamicQuantizeLinear"}
    products = {
        node.output[0]: (node.input[0], node.input[1])
        for node in nodes
        if node.op_type == "Mul" and node.input[0] in scales
    }
    changed: list[NodeProto] = []
    for node in nodes:
        if node.op_type == "DynamicQuantizeLinear":
            changed += quantize_tokens(node)
        elif any(name in products for name in node.input):
            changed += scale_after(node, products)
        elif node.output[0] not in products:
            changed.append(node)
    del nodes[:]
    nodes.extend(changed)
    model.graph.initializer.extend(numpy_helper.from_array(value, name) for name, value in CONSTANTS.items())


def quantize_tokens(node: NodeProto) -> list[NodeProto]:
    """scale = max(|x|) / 127 over the last axis; quantized = round(x / scale) + 128."""
    (x,), (quantized, scale, zero) = node.input, node.output
    size, largest, bounded, divided = (f"{quantized}_{part}" for part in ("size", "largest", "bounded", "divided"))
    return [
        helper.make_node("Abs", [x], [size]),
        helper.make_node("ReduceMax", [size, "token_last_axis"], [largest], keepdims=1),
        helper.make_node("Max", [largest, "token_least"], [bounded]),
        helper.make_node("Mul", [bounded, "token_step"], [scale]),
        helper.make_node("Div", [x, scale], [divided]),
        helper.make_node("QuantizeLinear", [divided, "token_one", "token_zero"], [quantized]),
        helper.make_node("Identity", ["token_zero"], [zero]),
    ]


def scale_after(node: NodeProto, products: dict[str, tuple[str, str]]) -> list[NodeProto]:
    """sums x (token's scale x weight's scale) as (sums x weight's scale) x token's scale.

    Multiplied with each other first, the two scales are the pattern that ONNX Runtime fuses, with the first token's
    scale for all.
    """
    (both,) = (name for name in node.input if name in products)
    (sums,) = (name for name in node.input if name not in products)
    token_scale, weight_scale = products[both]
    by_weight = f"{node.output[0]}_by_weight"
    return [
        helper.make_node("Mul", [sums, weight_scale], [by_weight]),
        helper.make_node("Mul", [by_weight, token_scale], [node.output[0]]),
    ]
