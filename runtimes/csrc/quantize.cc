// C interface of _edgelm_quant: argument checks, choice of the instruction set, threads.
#include "quantize.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <mutex>
#include <new>
#include <system_error>
#include <thread>
#include <vector>

#include "quantize_kernel.h"

namespace edgelm {
namespace {

const QuantizeKernel* FindKernel(int32_t isa) {
  switch (isa) {
    case EDGELM_ISA_SCALAR: return &kScalarKernel;
    case EDGELM_ISA_BASELINE: return &kBaselineKernel;
#if defined(EDGELM_X86)
    case EDGELM_ISA_AVX2: return __builtin_cpu_supports("avx2") ? &kAvx2Kernel : nullptr;
    case EDGELM_ISA_AVX512:
      return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                     __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
                 ? &kAvx512Kernel
                 : nullptr;
#endif
    case EDGELM_ISA_AUTO:
      for (int32_t wide : {EDGELM_ISA_AVX512, EDGELM_ISA_AVX2}) {
        if (const QuantizeKernel* kernel = FindKernel(wide)) return kernel;
      }
      return &kBaselineKernel;
    default: return nullptr;
  }
}

bool Fits(const edgelm_quant_matrix& m, int64_t row_stride) {
  return ((m.bits >= 3 && m.bits <= 6) || m.bits == 8) && m.rows >= 0 && m.columns > 0 && m.group > 0 &&
         m.columns % m.group == 0 && m.group * m.bits % 8 == 0 && row_stride >= m.columns && m.codes != nullptr &&
         m.scales != nullptr && (m.symmetric != 0 || m.zeros != nullptr) && m.threads >= 1;
}

// Call `work(first, last)` on chunks of `step` of [0, total), with `threads` threads including the calling one.
template <typename Work>
void Share(int64_t total, int64_t step, int threads, const Work& work) {
  std::atomic<int64_t> next{0};
  const auto loop = [&] {
    for (int64_t first; (first = next.fetch_add(step)) < total;) work(first, std::min(first + step, total));
  };
  const int64_t pieces = (total + step - 1) / step;
  std::vector<std::thread> others;
  try {
    for (int64_t i = 1; i < std::min<int64_t>(threads, pieces); ++i) others.emplace_back(loop);
  } catch (const std::system_error&) {
    // No more threads can be created; the existing ones do the work.
  }
  loop();
  for (std::thread& other : others) other.join();
}

constexpr std::align_val_t kAlignment{64};

struct Free {
  void operator()(void* pointer) const { ::operator delete(pointer, kAlignment); }
};

}  // namespace
}  // namespace edgelm

extern "C" {

int32_t edgelm_quant_abi(void) { return EDGELM_QUANT_ABI; }

int32_t edgelm_quant_has_isa(int32_t isa) { return edgelm::FindKernel(isa) != nullptr; }

int32_t edgelm_quantize(edgelm_quantize_arguments* arguments) {
  using namespace edgelm;
  edgelm_quant_matrix& m = arguments->matrix;
  arguments->bad_index = -1;
  if (!Fits(m, arguments->row_stride) || arguments->weights == nullptr || arguments->targets == nullptr ||
      arguments->target_count < 1 ||
      (arguments->weight_type != EDGELM_FLOAT32 && arguments->weight_type != EDGELM_BFLOAT16)) {
    return EDGELM_QUANT_BAD_ARGUMENT;
  }
  const QuantizeKernel* kernel = FindKernel(m.isa);
  if (kernel == nullptr) return EDGELM_QUANT_NO_SUCH_ISA;

  // Chunks of about 64 K weights: large compared with the cost of the counter, small enough to divide a small matrix
  // evenly.
  const int64_t batch = m.group * kernel->lanes, step = kernel->lanes * std::max<int64_t>(1, (1 << 16) / batch);
  const size_t bytes = static_cast<size_t>(batch) * (sizeof(float) + 1);
  std::mutex mutex;
  int32_t status = EDGELM_QUANT_OK;
  Share(m.rows * (m.columns / m.group), step, m.threads, [&](int64_t first, int64_t last) {
    const std::unique_ptr<void, Free> scratch(::operator new(bytes, kAlignment));
    int32_t found = EDGELM_QUANT_OK;
    const int64_t bad = kernel->quantize(*arguments, first, last, scratch.get(), &found);
    if (bad < 0) return;
    // All chunks are processed even after an error, so that the first bad weight is reported with any number of
    // threads.
    const std::lock_guard<std::mutex> lock(mutex);
    if (arguments->bad_index < 0 || bad < arguments->bad_index) {
      arguments->bad_index = bad;
      status = found;
    }
  });
  return status;
}

int32_t edgelm_dequantize(const edgelm_dequantize_arguments* arguments) {
  using namespace edgelm;
  const edgelm_quant_matrix& m = arguments->matrix;
  if (!Fits(m, arguments->row_stride) || arguments->values == nullptr) return EDGELM_QUANT_BAD_ARGUMENT;
  const QuantizeKernel* kernel = FindKernel(m.isa);
  if (kernel == nullptr) return EDGELM_QUANT_NO_SUCH_ISA;
  Share(m.rows, std::max<int64_t>(1, (1 << 16) / m.columns), m.threads,
        [&](int64_t first, int64_t last) { kernel->dequantize(*arguments, first, last); });
  return EDGELM_QUANT_OK;
}

int32_t edgelm_fit(const edgelm_fit_arguments* arguments) {
  using namespace edgelm;
  const edgelm_fit_arguments& a = *arguments;
  if (a.rows < 0 || a.columns < 1 || a.stride < a.rows || a.trial_count < 1 || a.threads < 1 ||
      a.numbers < EDGELM_INTEGERS || a.numbers > EDGELM_E5M2 || a.weights == nullptr || a.importance == nullptr ||
      a.trials == nullptr || a.lowest == nullptr || a.scale == nullptr) {
    return EDGELM_QUANT_BAD_ARGUMENT;
  }
  const QuantizeKernel* kernel = FindKernel(a.isa);
  if (kernel == nullptr) return EDGELM_QUANT_NO_SUCH_ISA;
  Share(a.rows, 256, a.threads, [&](int64_t first, int64_t last) { kernel->fit(a, first, last); });
  return EDGELM_QUANT_OK;
}

int32_t edgelm_feedback(const edgelm_feedback_arguments* arguments) {
  using namespace edgelm;
  const edgelm_feedback_arguments& a = *arguments;
  if (a.rows < 0 || a.columns < 1 || a.columns > EDGELM_FEEDBACK_COLUMNS || a.stride < a.rows ||
      a.coupling_stride < a.columns || a.threads < 1 || a.numbers < EDGELM_INTEGERS || a.numbers > EDGELM_E5M2) {
    return EDGELM_QUANT_BAD_ARGUMENT;
  }
  for (const float* array : {a.weights, a.target, static_cast<const float*>(a.values),
                             static_cast<const float*>(a.error), a.coupling, a.scale, a.inverse, a.lowest}) {
    if (array == nullptr) return EDGELM_QUANT_BAD_ARGUMENT;
  }
  const QuantizeKernel* kernel = FindKernel(a.isa);
  if (kernel == nullptr) return EDGELM_QUANT_NO_SUCH_ISA;
  Share(a.rows, 256, a.threads, [&](int64_t first, int64_t last) { kernel->feedback(a, first, last); });
  return EDGELM_QUANT_OK;
}

}  // extern "C"
