"""Export for ONNX Runtime: the targets `cpu` and `cuda`, and the small files beside the graph."""
