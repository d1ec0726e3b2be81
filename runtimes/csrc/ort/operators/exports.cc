// The library's entry point. ONNX Runtime calls it for each SessionOptions.register_custom_ops_library. libedgelm leaves
// this file out: it exports edgelm.h only.
#include "kernels/cpu.h"
#include "ort/op.h"

extern "C" EDGELM_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return edgelm::ort::RegisterOperators(options, base);
}
