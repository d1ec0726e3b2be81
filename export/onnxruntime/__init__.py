"""Bundles for ONNX Runtime: its targets, and the small files that go beside its graph."""
