"""The CUDA kernels: sources, compilation, and compiled images."""
