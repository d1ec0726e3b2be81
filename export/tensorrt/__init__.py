"""Bundles for NVIDIA GPUs: our operators as TensorRT plugins or launched through the driver."""
