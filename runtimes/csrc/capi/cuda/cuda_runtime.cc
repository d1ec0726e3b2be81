// The runtime cuda-kernels. As runtimes/cuda/model.py.
#include <algorithm>

#include "capi/cuda/loaded_program.h"
#include "capi/runtime/cuda.h"
#include "capi/runtime/options.h"

namespace edgelm::capi {
namespace {

constexpr std::int64_t kLogitsBytes = 64 << 20;  // of a block of `logits_all`

class CudaRuntime : public Runtime {
 public:
  CudaRuntime(const Bundle& bundle, const RuntimeOptions& options) {
    name = "cuda-kernels";
    kv = options.kv.empty() ? bundle.manifest().kv_dtype : options.kv;
    set_sizes(*this, bundle, options, kCudaChunk);
    threads = 1;
    rows_ = std::max<std::int64_t>(1, std::min(chunk, kLogitsBytes / (4 * vocab_size)));
    guarded([&] {
      loaded_ = std::make_unique<LoadedProgram>(bundle, false);
      const gpu::Device::Current current(loaded_->device());
      run_ = loaded_->execution({1, context_length, chunk, rows_, kv}, {});
    });
  }

  const float* decode(std::int32_t token) override {
    append(token, false);
    return logits_.data();
  }

  std::int32_t decode_greedy(std::int32_t token) override {
    const std::int32_t found = append(token, true);
    if (found >= 0) return found;
    fail(EDGELM_RUNTIME, "every logit is NaN, as of damaged weights or values too large: run edgelm parity");
  }

  void write_cache(std::int64_t length, const std::function<void(const void*, std::size_t)>& write) override {
    if (length < 0 || length > position_) fail(EDGELM_INTERNAL, length, " of ", position_, " cached tokens are saved");
    guarded([&] {
      const gpu::Device::Current current(loaded_->device());
      run_->executor->write_cache(0, length, write);
    });
  }

  void read_cache(std::int64_t length, const std::function<void(void*, std::size_t)>& read) override {
    if (length < 0 || length > context_length) {
      fail(EDGELM_CONTEXT_FULL, "a session of ", length, " tokens does not fit into a context of ", context_length);
    }
    position_ = 0;  // if this fails
    guarded([&] {
      const gpu::Device::Current current(loaded_->device());
      run_->executor->read_cache(0, length, read);
    });
    position_ = length;
  }

  std::uint64_t cache_bytes(std::int64_t length) const override { return run_->executor->cache_bytes(length); }

 protected:
  const float* prefill_step(const std::int32_t* ids, std::int64_t count, bool last) override {
    run({ids, {1, count}, nullptr}, last ? 1 : 0);
    return logits_.data();
  }

  const float* prefill_all(const std::int32_t* ids, std::int64_t count) override {
    if (count > rows_) fail(EDGELM_INTERNAL, "logits of ", count, " positions, and memory for ", rows_);
    gpu::Step step{ids, {1, count}, nullptr};
    step.all_positions = true;
    run(step, count);
    return logits_.data();
  }

 private:
  // Append one token; return the argmax after it if `greedy`.
  std::int32_t append(std::int32_t token, bool greedy) {
    check_fits(&token, 1);
    check_cancelled();
    gpu::Step step{&token, {1, 1}, nullptr};
    step.greedy = greedy;
    step.graph = true;
    const std::int32_t found = run(step, greedy ? 0 : 1);
    ++position_;
    return found;
  }

  // Run a step after the cached tokens; copy the logits of `rows` positions, or return the argmax.
  std::int32_t run(gpu::Step step, std::int64_t rows) {
    const std::int32_t length = std::int32_t(position_);
    std::int32_t found = 0;
    step.lengths = &length;
    logits_.resize(std::max(logits_.size(), std::size_t(rows * vocab_size)));
    guarded([&] {
      const gpu::Device::Current current(loaded_->device());
      run_->executor->run(step);
      if (rows) run_->executor->logits(rows, logits_.data());
      if (step.greedy) run_->executor->chosen(1, &found);
    });
    return found;
  }

  std::unique_ptr<LoadedProgram> loaded_;
  std::unique_ptr<Execution> run_;
  std::int64_t rows_ = 1;  // positions whose logits are computed in one step
  std::vector<float> logits_;
};

}  // namespace

std::unique_ptr<Runtime> open_cuda_runtime(const Bundle& bundle, const RuntimeOptions& options) {
  return std::make_unique<CudaRuntime>(bundle, options);
}

}  // namespace edgelm::capi
