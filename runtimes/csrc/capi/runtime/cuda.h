// GPU bundles (target tensorrt) run by EdgeLM's kernels through the NVIDIA driver: the runtime "cuda-kernels".
#pragma once

#include <memory>

#include "capi/runtime/runtime.h"

namespace edgelm::capi {

constexpr std::int64_t kCudaChunk = 2048;  // default tokens of a prefill step, as in runtimes/cuda/model.py

// Load a bundle for `tensorrt` to the GPU that EDGELM_GPU names, otherwise the first. Throws as `open_runtime`.
std::unique_ptr<Runtime> open_cuda_runtime(const Bundle& bundle, const RuntimeOptions& options);

// Its debug program, with exact matmuls and a float32 cache.
std::unique_ptr<Tracing> open_cuda_tracing(const Bundle& bundle, const RuntimeOptions& options);

}  // namespace edgelm::capi
