"""int8: weights and word embeddings in 8 bits, activations put into 8 bits while the graph runs.

What a reader would get wrong: the score head stays in float32. It is a product of a few thousand numbers, costs
nothing, and 8 bits there would make documents tie.
"""

from pathlib import Path

import onnx

from rag_retrieval.export.graph import EXTERNAL_FROM, beside, quiet, score_head
from rag_retrieval.export.token_scales import scale_by_token


def quantize_int8(source: Path, target: Path) -> None:
    """Write `target`: signed weights with a scale for each output channel, activations with one for each token.

    Weights take 7 of their 8 bits. On x86 processors without VNNI the sum of two full products overflows 16 bits, and
    the scores would be others there than on the machine where they were checked; measured on a MiniLM, the eighth bit
    is worth nothing (rank correlation with float32 0.992 with it, 0.993 without).
    """
    from onnxruntime.quantization import QuantType, quantize_dynamic

    model = onnx.load(source)
    heads = score_head(model)
    # a Gemm is first made a MatMul, under this new name
    kept = [*heads, *(f"{name}_MatMul" for name in heads), *other_lookups(model)]
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
            use_external_data_format=weight_bytes(source) >= EXTERNAL_FROM,
            extra_options={"DefaultTensorType": onnx.TensorProto.FLOAT},  # of what fused nodes give
        )
    quantized = onnx.load(target)
    scale_by_token(quantized)
    external = beside(target).is_file()
    beside(target).unlink(missing_ok=True)
    onnx.save(quantized, target, save_as_external_data=external, location=beside(target).name)


def other_lookups(model: onnx.ModelProto) -> list[str]:
    """Names of the Gather nodes that look up something else than the embedding of a token."""
    lookups = [node for node in model.graph.node if node.op_type == "Gather"]
    return [node.name for node in lookups if node.input[1] != "input_ids"]


def weight_bytes(file: Path) -> int:
    """Of the graph's file and of the weights beside it."""
    data = beside(file)
    return file.stat().st_size + (data.stat().st_size if data.is_file() else 0)
