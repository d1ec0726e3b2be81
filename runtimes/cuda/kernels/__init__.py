"""The CUDA kernels: sources, compilation, and what each launch is given."""
