// The files of a GPU bundle: program.json and kernels/kernels.json.
#pragma once

#include <string>

#include "cuda/executor/device.h"
#include "cuda/executor/program.h"

namespace edgelm::capi {

// Read and check a program, or the debug program of it. Throws Error(EDGELM_BUNDLE).
gpu::Program read_program(const std::string& path, bool debug);

// Read the description of the compiled kernels in `folder`. Throws Error(EDGELM_BUNDLE).
gpu::KernelIndex read_kernel_index(const std::string& folder);

}  // namespace edgelm::capi
