// Bundles for the CPU in ONNX Runtime: the runtime "onnxruntime-cpu", for native and for portable operators.
#pragma once

#include <memory>

#include "capi/runtime/runtime.h"

namespace edgelm::capi {

// Load a bundle for `cpu`. Throws as `open_runtime`.
std::unique_ptr<Runtime> open_cpu_runtime(const Bundle& bundle, const RuntimeOptions& options);

// Its debug graph.
std::unique_ptr<Tracing> open_cpu_tracing(const Bundle& bundle, const RuntimeOptions& options);

// Bytes of the keys of one head and token in a native cache, as edgelm/bundle/kv_cache.py has them. Throws
// Error(EDGELM_INVALID_ARGUMENT) if there is no such type.
std::int64_t native_row_bytes(const std::string& kv, std::int64_t head_dim);

// A portable cache's element type, and its bytes. Throws Error(EDGELM_BUNDLE) if portable operators do not have it.
struct PortableType {
  int element;
  std::int64_t bytes;
};
PortableType portable_type(const Bundle& bundle);

}  // namespace edgelm::capi
