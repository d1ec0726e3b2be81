"""Runtime `cuda`: EdgeLM's own kernels on NVIDIA GPUs, compiled by NVRTC, launched through the driver or emulated on a
CPU."""
