"""From a decoder to an ONNX graph: one builder for each set of operators."""
