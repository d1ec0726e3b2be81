"""Export for NVIDIA GPUs: our operators as TensorRT plugins or launched by our own runtime."""
