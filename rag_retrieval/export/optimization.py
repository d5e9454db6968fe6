"""Nodes fused by ONNX Runtime's optimizer for transformers, into operators that only ONNX Runtime has.

What a reader would get wrong: ONNX Runtime fuses as much by itself whenever it opens a graph, and scores no slower
without this. It is done once here, and not at every start.
"""

from pathlib import Path

from rag_retrieval.export.graph import beside, quiet


def optimize_graph(file: Path) -> dict[str, int]:
    """Replace the graph in `file`. Returns how many of which fused operators are in it."""
    from onnxruntime.transformers.optimizer import optimize_model

    data = beside(file)
    external = data.is_file()
    with quiet():
        # its "bert" is its way for encoders and decoders alike; 0: it finds heads and width in the graph
        optimized = optimize_model(str(file), model_type="bert", num_heads=0, hidden_size=0, opt_level=0)
    data.unlink(missing_ok=True)
    optimized.save_model_to_file(str(file), use_external_data_format=external)
    return {name: count for name, count in optimized.get_fused_operator_statistics().items() if count}
