"""int8: weights and word embeddings in 8 bits, and what goes into products put into 8 bits while the graph runs.

Where texts were given to calibrate with, each of these inputs has one scale for all texts, from `calibrate`: static
int8. Otherwise each token has a scale of its own, from its largest value: dynamic int8. In both a score does not depend
on the pairs that it is computed with, as it would (by up to 0.3 on a MiniLM) with ONNX Runtime's dynamic quantization,
which scales by the largest value of a whole batch.

The graph has ONNX's own nodes alone: QuantizeLinear and DequantizeLinear before each product, which ONNX Runtime makes
one product of integers, and which OpenVINO reads too.
"""

import ast
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

import numpy as np
import onnx
from onnx import ModelProto, NodeProto, helper, numpy_helper

from rag_retrieval.export.calibrate import Range
from rag_retrieval.export.onnx_graph import EXTERNAL_FROM, beside, last_products

# Weights take 7 of their 8 bits. On x86 processors without VNNI the sum of two full products overflows 16 bits, and
# scores would be others there than on the machine where they were checked; measured on a MiniLM, the eighth bit is
# worth nothing (rank correlation with float32 0.992 with it, 0.993 without).
LARGEST_WEIGHT = 63
LARGEST_EMBEDDING = 127  # a table is read, not multiplied
MIDDLE, TOKEN_STEPS = 128, 127  # of dynamic int8: zero, and steps on either side of it
LEAST = np.float32(1e-20)  # a token or a row of zeros keeps a scale above 0
LEVELS = 255
SCOPES = "pkg.torch.onnx.name_scopes"  # metadata of torch's exporter: modules around a node, outermost first


@dataclass(frozen=True)
class Layers:
    """What can be put into 8 bits: nodes by the name of their module, as `encoder.layer.0.attention.self.query`, in the
    order of the graph. inputs: of the products, what goes in, by node."""

    nodes: dict[str, list[str]]
    inputs: dict[str, str]

    def matching(self, patterns: Sequence[str]) -> list[str]:
        """Names that match one of the patterns (as of files, `*` for any text), whole or from a dot on: `layer.11.*`
        too. Raises ValueError, with the names, for a pattern that matches none."""
        found: dict[str, None] = {}
        for pattern in patterns:
            own = [name for name in self.nodes if fnmatchcase(name, pattern) or fnmatchcase(name, f"*.{pattern}")]
            if not own:
                known = ", ".join(self.nodes)
                raise ValueError(f"exclude_layers: no layer matches {pattern!r}; the layers are {known}")
            found |= dict.fromkeys(own)
        return [name for name in self.nodes if name in found]

    def nodes_without(self, names: Collection[str]) -> set[str]:
        return {node for name, own in self.nodes.items() if name not in names for node in own}


def layers_of(model: ModelProto, heads: Sequence[str]) -> Layers:
    """Products with weights and lookups of tokens. heads: outputs whose last product is left out: it is one of a few
    thousand numbers, costs nothing, and 8 bits there would make documents tie."""
    weights = {value.name for value in model.graph.initializer if len(value.dims) == 2}
    kept = {name for head in heads for name in last_products(model, head)}
    nodes: dict[str, list[str]] = {}
    inputs = {}
    for node in model.graph.node:
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in weights and node.name not in kept:
            inputs[node.name] = node.input[0]
        elif node.op_type != "Gather" or node.input[0] not in weights or node.input[1] != "input_ids":
            continue
        nodes.setdefault(module_name(node), []).append(node.name)
    return Layers(nodes, inputs)


def module_name(node: NodeProto) -> str:
    """As the Hugging Face model calls it; the node's own where torch's exporter did not say."""
    scopes = next((entry.value for entry in node.metadata_props if entry.key == SCOPES), "[]")
    modules = ast.literal_eval(scopes)[1:-1]
    return modules[-1].removeprefix("model.").removeprefix("model.") if modules else node.name


def quantize_int8(
    source: Path,
    target: Path,
    nodes: Collection[str],
    ranges: Mapping[str, Range] | None = None,
    per_channel: bool = True,
) -> None:
    """Write `target` with these nodes of `source` in 8 bits. ranges: of what goes into products; None: dynamic.
    per_channel: a scale for each output channel of the weights, in place of one for all."""
    model = onnx.load(source)
    writer = Writer({value.name: value for value in model.graph.initializer}, ranges, per_channel)
    for node in model.graph.node:
        if node.name not in nodes:
            writer.nodes.append(node)
        elif node.op_type == "Gather":
            writer.write_lookup(node)
        else:
            writer.write_product(node)
    used = {name for node in writer.nodes for name in node.input} | {value.name for value in model.graph.output}
    del model.graph.node[:], model.graph.initializer[:]
    del model.graph.value_info[:]
    model.graph.node.extend(writer.nodes)
    model.graph.initializer.extend(value for name, value in writer.constants.items() if name in used)
    external = model.ByteSize() >= EXTERNAL_FROM
    onnx.save(model, target, save_as_external_data=external, location=beside(target).name)


class Writer:
    """Collects the nodes and constants of a quantized graph, in order."""

    def __init__(self, constants: dict[str, onnx.TensorProto], ranges: Mapping[str, Range] | None, per_channel: bool):
        self.constants, self.ranges, self.per_channel = constants, ranges, per_channel
        self.nodes: list[NodeProto] = []
        self.written: set[str] = set()  # inputs that are quantized already: several products share one

    def add(self, kind: str, inputs: Sequence[str], output: str, **attributes) -> str:
        self.nodes.append(helper.make_node(kind, inputs, [output], f"{output}/{kind}", **attributes))
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        self.constants[name] = numpy_helper.from_array(np.asarray(value), name)
        return name

    def write_lookup(self, node: NodeProto) -> None:
        """A row of 8 bits times the scale of the row."""
        (table, ids), (output,) = node.input, node.output
        rows = numpy_helper.to_array(self.constants[table]).astype(np.float32)
        scales = np.maximum(np.abs(rows).max(axis=1, keepdims=True) / LARGEST_EMBEDDING, LEAST)
        small = self.constant(f"{table}/int8", np.rint(rows / scales).astype(np.int8))
        found = self.add("Gather", [small, ids], f"{output}/int8")
        found = self.add("Cast", [found], f"{output}/floats", to=onnx.TensorProto.FLOAT)
        scale = self.add("Gather", [self.constant(f"{table}/scale", scales), ids], f"{output}/scale")
        self.add("Mul", [found, scale], output)

    def write_product(self, node: NodeProto) -> None:
        attributes = {each.name: helper.get_attribute_value(each) for each in node.attribute}
        assert node.op_type == "MatMul" or all(attributes.get(name, 1) == 1 for name in ("alpha", "beta"))
        x, name, *bias = node.input
        weight = self.write_weight(name, bool(attributes.get("transB")))
        product = f"{node.output[0]}/product" if bias or self.ranges is None else node.output[0]
        if self.ranges is not None:
            self.add("MatMul", [self.write_static(x), weight], product)
        else:
            steps, scale = self.write_dynamic(x)
            product = self.add("MatMul", [steps, weight], f"{product}/steps")
            product = self.add("Mul", [product, scale], f"{node.output[0]}/product" if bias else node.output[0])
        if bias:
            self.add("Add", [product, *bias], node.output[0])

    def write_weight(self, name: str, transposed: bool) -> str:
        """[in, out], as floats again: round(w / scale) x scale with scale = max(|w|) / 63."""
        output = f"{name}/{'transposed' if transposed else 'dequantized'}"
        if output in self.written:
            return output
        self.written.add(output)
        weight = numpy_helper.to_array(self.constants[name]).astype(np.float32)
        weight = weight.T if transposed else weight
        largest = np.abs(weight).max(axis=0 if self.per_channel else None)
        scale = np.maximum(largest / LARGEST_WEIGHT, LEAST).astype(np.float32)
        parts = (np.rint(weight / scale).astype(np.int8), scale, np.zeros_like(scale, np.int8))
        names = [f"{output}/{part}" for part in ("int8", "scale", "zero")]
        constants = [self.constant(*pair) for pair in zip(names, parts, strict=True)]
        return self.add("DequantizeLinear", constants, output, axis=1)

    def write_static(self, x: str) -> str:
        """Rounded to one of 256 steps between the ends of its range."""
        output = f"{x}/dequantized"
        if output not in self.written:
            self.written.add(output)
            scale, zero = static_scale(self.ranges[x])
            self.write_rounding(x, self.constant(f"{x}/scale", scale), self.constant(f"{x}/zero", zero), output)
        return output

    def write_dynamic(self, x: str) -> tuple[str, str]:
        """(steps, scale) with scale = max(|x|) / 127 over the last axis and steps = round(x / scale)."""
        output, scale = f"{x}/steps", f"{x}/token_scale"
        if output not in self.written:
            self.written.add(output)
            last = self.constant("token/last_axis", np.array([-1], np.int64))
            largest = self.add("ReduceMax", [self.add("Abs", [x], f"{x}/size"), last], f"{x}/largest", keepdims=1)
            largest = self.add("Max", [largest, self.constant("token/least", LEAST)], f"{x}/bounded")
            self.add("Mul", [largest, self.constant("token/step", np.float32(1 / TOKEN_STEPS))], scale)
            divided = self.add("Div", [x, scale], f"{x}/divided")
            one, zero = self.constant("token/one", np.float32(1)), self.constant("token/zero", np.uint8(MIDDLE))
            self.write_rounding(divided, one, zero, output)
        return output, scale

    def write_rounding(self, x: str, scale: str, zero: str, output: str) -> None:
        quantized = self.add("QuantizeLinear", [x, scale, zero], f"{output}/uint8")
        self.add("DequantizeLinear", [quantized, scale, zero], output)


def static_scale(ends: Range) -> tuple[np.float32, np.uint8]:
    """(scale, the step that stands for 0) with which 255 steps cover the range."""
    scale = np.maximum(np.float32((ends.high - ends.low) / LEVELS), LEAST)
    return scale, np.uint8(np.clip(np.rint(-ends.low / scale), 0, LEVELS))
