#include <algorithm>

#include "capi/runtime/onnxruntime/session.h"

namespace edgelm::capi {

BoundGraph::BoundGraph(const Session& session, const MappedFile& weights, std::int64_t chunk, std::int64_t vocab_size)
    : session_(session),
      weights_(weights),
      library_(session.library()),
      vocab_size_(vocab_size),
      ids_(std::size_t(chunk)),
      logits_(std::size_t(vocab_size)),
      memory_(library_),
      short_(library_),
      long_(library_),
      binding_(library_),
      all_(library_) {
  const OrtApi* api = library_.api;
  library_.require(ort::CreateCpuMemoryInfo(api, ort::kDeviceAllocator, ort::kDefaultMemory, memory_.out()));
  library_.require(ort::CreateRunOptions(api, short_.out()));
  library_.require(ort::CreateRunOptions(api, long_.out()));
  // A chunk's activations are large and decoding does not need their memory: free it.
  library_.require(ort::AddRunConfigEntry(api, long_.get(), "memory.enable_memory_arena_shrinkage", "cpu:0"));
  library_.require(ort::CreateIoBinding(api, session.get(), binding_.out()));
  bind_logits(false);  // the first output
  bind_input("logits_start", &start_, sizeof start_, {1}, ort::kInt64);
}

void BoundGraph::bind_input(const std::string& name, void* data, std::uint64_t bytes,
                            const std::vector<std::int64_t>& shape, int type) {
  const OwnedValue value = session_.tensor(data, bytes, shape, type);
  library_.require(ort::BindInput(library_.api, binding_.get(), name.c_str(), value.get()), EDGELM_BUNDLE);
}

void BoundGraph::bind_cache(const std::pair<std::string, std::string>& names, const Untouched& cache,
                            const std::vector<std::int64_t>& shape, int type) {
  const OwnedValue value = session_.tensor(cache.data(), cache.bytes(), shape, type);
  library_.require(ort::BindInput(library_.api, binding_.get(), names.first.c_str(), value.get()), EDGELM_BUNDLE);
  library_.require(ort::BindOutput(library_.api, binding_.get(), names.second.c_str(), value.get()), EDGELM_BUNDLE);
}

void BoundGraph::bind_logits(bool allocated) {
  if (logits_allocated_ == allocated && !allocated) return;
  logits_allocated_ = allocated;
  all_.reset();
  if (allocated) {
    // The graph declares one row, which GenAI uses to allocate. ONNX Runtime rejects a larger bound buffer, but allocates
    // one of the true size itself.
    library_.require(ort::BindOutputToDevice(library_.api, binding_.get(), "logits", memory_.get()));
    return;
  }
  const OwnedValue value = session_.tensor(logits_.data(), 4 * logits_.size(), {1, 1, vocab_size_}, ort::kFloat);
  library_.require(ort::BindOutput(library_.api, binding_.get(), "logits", value.get()));
}

const float* BoundGraph::step(const std::int32_t* ids, std::int64_t count, bool all_positions) {
  weights_.check();
  std::copy(ids, ids + count, ids_.begin());
  if (bound_ids_ != count) {
    bind_input("input_ids", ids_.data(), std::uint64_t(8 * count), {1, count}, ort::kInt64);
    bound_ids_ = count;
  }
  start_ = all_positions ? 0 : -1;
  const bool allocated = all_positions && count > 1;
  bind_logits(allocated);
  OrtStatus* status = ort::RunWithBinding(library_.api, session_.get(), (count > 1 ? long_ : short_).get(),
                                          binding_.get());
  if (status != nullptr) {
    const std::string why = library_.problem(status);
    if (cancelled_) fail(EDGELM_CANCELLED, "the call was cancelled");
    fail(EDGELM_RUNTIME, "onnxruntime failed while running the model: ", why,
         "; if memory ran out, use a smaller context_length or a smaller chunk than ", ids_.size());
  }
  return allocated ? allocated_logits(count) : logits_.data();
}

const float* BoundGraph::allocated_logits(std::int64_t count) {
  OrtValue** values = nullptr;
  std::size_t number = 0;
  library_.require(ort::GetBoundOutputValues(library_.api, binding_.get(), session_.allocator(), &values, &number));
  for (std::size_t i = 0; i < number; ++i) {
    if (i == 0) *all_.out() = values[i];
    else ort::ReleaseValue(library_.api, values[i]);
  }
  if (values != nullptr) library_.require(ort::AllocatorFree(library_.api, session_.allocator(), values));
  std::vector<std::int64_t> shape;
  const float* logits = session_.floats(all_.get(), &shape);
  if (shape != std::vector<std::int64_t>{1, count, vocab_size_}) {
    fail(EDGELM_BUNDLE, "the graph's logits do not have the shape [1, ", count, ", ", vocab_size_,
         "]: export the bundle again");
  }
  return logits;
}

void BoundGraph::cancel() {
  cancelled_ = true;
  for (const OwnedRunOptions* options : {&short_, &long_}) {
    library_.problem(ort::RunOptionsSetTerminate(library_.api, options->get()));
  }
}

void BoundGraph::resume() {
  cancelled_ = false;
  for (const OwnedRunOptions* options : {&short_, &long_}) {
    library_.problem(ort::RunOptionsUnsetTerminate(library_.api, options->get()));
  }
}

}  // namespace edgelm::capi
