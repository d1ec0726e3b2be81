// C interface to the timing of kernels, for runtimes/onnxruntime/measure.py (ctypes).
#ifndef EDGELM_ORT_MEASURE_H_
#define EDGELM_ORT_MEASURE_H_

#include <cstdint>

#include "kernels/cpu.h"

namespace edgelm::ort {

enum : int32_t { kMeasureDone = 0, kMeasureNoKernels = 1, kMeasureInvalid = 2, kMeasureNoMemory = 3 };

}  // namespace edgelm::ort

extern "C" {

// A matmul (cache < 0) or an attention (cache: a CacheKind) of `tokens` new tokens.
struct edgelm_measured {
  const uint8_t* weights;  // `matrices` packed matrices of one shape, `stride` bytes apart
  int64_t stride;
  int64_t matrices;
  int64_t tokens;
  int64_t high_only;  // 1: read the high nibbles of an int8 matrix in split nibbles alone
  int64_t floats;     // 1: float32 activations, not int8
  int64_t cache;
  int64_t heads;
  int64_t kv_heads;
  int64_t head_dim;
  int64_t past;  // cached tokens
};

// Run the operations one after another, `passes` times, on `threads` threads. `seconds` receives [passes, count] times.
// Returns 0, or one of the constants above.
EDGELM_EXPORT int32_t edgelm_measure(const edgelm_measured* ops, int64_t count, int32_t threads, int32_t passes,
                                     double* seconds);

}  // extern "C"

#endif  // EDGELM_ORT_MEASURE_H_
