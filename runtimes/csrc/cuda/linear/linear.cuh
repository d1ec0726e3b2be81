// All kernels for y = x W^T with quantised or float weights W, and the small kernels around them.
#pragma once

#include "embedding.cuh"
#include "linear/linear_exact.cuh"
#include "linear/linear_gemm.cuh"
#include "linear/linear_skinny.cuh"
#include "norm.cuh"
