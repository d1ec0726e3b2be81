"""The CUDA kernels: sources, compilation, and the arguments of each launch."""
