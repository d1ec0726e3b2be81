// Launches of linear_skinny, the kernel of matmuls with few rows (decoding): how its work is divided.
#pragma once

#include "cuda/host/operators/linear.h"
#include "cuda/linear/linear_args.cuh"

namespace edgelm::gpu {

// The launch of a matmul that uses the skinny kernel. `args`: those of every matmul kernel. Throws Error if the shapes
// do not fit the device.
Launch skinny_launch(const Matmul& matmul, const DeviceInfo& device, const LinearArgs& args);

// The kernels that multiply with this matrix, for any number of rows.
KernelNames skinny_kernels(const Matrix& matrix, const std::string& activation);

// All kernels of `header`, for weights of type `kind`.
void add_skinny_kernels(KernelSources& to, const char* header, const std::string& activation, const std::string& kind);

// The largest number of rows that a matmul may have for a single expert.
i64 most_rows_of(const Matmul& matmul);

}  // namespace edgelm::gpu
