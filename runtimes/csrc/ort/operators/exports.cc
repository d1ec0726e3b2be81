// The library's entry point, which ONNX Runtime calls for each SessionOptions.register_custom_ops_library, and what
// cpu.h declares of the operators. libedgelm leaves this file out: it exports edgelm.h only.
#include "kernels/cpu.h"
#include "ort/op.h"

extern "C" EDGELM_EXPORT OrtStatus* RegisterCustomOps(OrtSessionOptions* options, const OrtApiBase* base) {
  return edgelm::ort::RegisterOperators(options, base);
}

int32_t edgelm_exact_logits(int32_t on) {
  const bool before = edgelm::ort::ExactLogits();
  edgelm::ort::ExactLogits() = on != 0;
  return before;
}
