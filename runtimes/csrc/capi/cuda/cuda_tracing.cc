// The debug program of a GPU bundle. As CudaTracing of runtimes/cuda/model.py.
#include "capi/cuda/loaded_program.h"
#include "capi/runtime/checks.h"
#include "capi/runtime/cuda.h"

namespace edgelm::capi {
namespace {

class CudaTracing : public Tracing {
 public:
  explicit CudaTracing(const Bundle& bundle) : model_(bundle.manifest().model) {
    guarded([&] { loaded_ = std::make_unique<LoadedProgram>(bundle, true); });
  }

  std::vector<Value> run(const std::int32_t* ids, std::int64_t batch, std::int64_t tokens,
                         const std::vector<std::string>& names, bool logits) override {
    if (batch < 1 || tokens < 1 || tokens > model_.context_length || batch > std::int64_t(1) << 20) {
      fail(EDGELM_INVALID_ARGUMENT, batch, " texts of ", tokens, " tokens: give 1 to ", model_.context_length,
           " tokens, the model's limit");
    }
    check_tokens(ids, std::size_t(batch * tokens), model_.vocab_size);
    for (const std::string& name : names) check_name(name);
    return guarded([&] { return values(ids, batch, tokens, names, logits); });
  }

 private:
  void check_name(const std::string& name) const {
    if (loaded_->program().values.count(name)) return;
    fail(EDGELM_BUNDLE, "program.json: no node computes ", quoted(name), ": export the bundle again");
  }

  std::vector<Value> values(const std::int32_t* ids, std::int64_t batch, std::int64_t tokens,
                            const std::vector<std::string>& names, bool logits) {
    const gpu::Device::Current current(loaded_->device());
    const std::int64_t rows = batch * tokens;
    const auto run = loaded_->execution({batch, tokens, rows, logits ? rows : batch, "float32"},
                                        {names.begin(), names.end()});
    const std::vector<std::int32_t> lengths(std::size_t(batch), 0);
    gpu::Step step{ids, {batch, tokens}, lengths.data()};
    step.all_positions = logits;
    run->executor->run(step);
    std::vector<Value> found;
    for (const std::string& name : names) {
      const std::int64_t each = name == "logits" && !logits ? 1 : tokens;
      const std::int64_t width = loaded_->program().values.at(name).width;
      found.push_back({{batch, each, width}, std::vector<float>(std::size_t(batch * each * width))});
      run->executor->value(name, batch * each, found.back().data.data());
    }
    return found;
  }

  ModelInfo model_;
  std::unique_ptr<LoadedProgram> loaded_;
};

}  // namespace

std::unique_ptr<Tracing> open_cuda_tracing(const Bundle& bundle, const RuntimeOptions&) {
  return std::make_unique<CudaTracing>(bundle);
}

}  // namespace edgelm::capi
