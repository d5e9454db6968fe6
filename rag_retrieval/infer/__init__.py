"""Running a reranker: texts in, ranked documents out, from torch, ONNX Runtime or OpenVINO."""
