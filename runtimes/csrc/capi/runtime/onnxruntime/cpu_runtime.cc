#include "capi/runtime/onnxruntime/cpu_runtime.h"

#include <algorithm>

#if defined(__GLIBC__)
#include <malloc.h>
#endif

#include "capi/runtime/options.h"
#include "capi/runtime/onnxruntime/cache_rows.h"
#include "capi/runtime/onnxruntime/session.h"
#include "kernels/cpu.h"

namespace edgelm::capi {
namespace {

std::string chosen_kv(const Bundle& bundle, const RuntimeOptions& options) {
  const std::string& stored = bundle.manifest().kv_dtype;
  const std::string kv = options.kv.empty() ? stored : options.kv;
  if (bundle.manifest().ops == "native") {
    native_row_bytes(kv, 1);
  } else if (kv != stored) {
    fail(EDGELM_INVALID_ARGUMENT, "kv is ", quoted(kv), ", but the cache of ", bundle.path(), " is ", stored,
         ": leave kv out, or export with --ops native");
  }
  return kv;
}

// Freed heap memory goes back to the system. After a large block was freed, glibc raises its mmap threshold: a second
// model then lies in the heap, and its memory would stay resident after the model was closed.
struct ReturnsMemory {
  ~ReturnsMemory() {
#if defined(__GLIBC__)
    malloc_trim(0);
#endif
  }
};

class CpuRuntime : public Runtime {
 public:
  CpuRuntime(const Bundle& bundle, const RuntimeOptions& options)
      : native_(bundle.manifest().ops == "native"),
        weights_(bundle.file(bundle.manifest().weights_file), EDGELM_BUNDLE) {
    name = "onnxruntime-cpu";
    kv = chosen_kv(bundle, options);
    set_sizes(*this, bundle, options);
    require_whole(bundle);
    const ModelInfo& model = bundle.manifest().model;
    heads_ = model.num_kv_heads;
    const PortableType type = native_ ? PortableType{ort::kUint8, 1} : portable_type(bundle);
    const std::int64_t width = native_ ? native_row_bytes(kv, model.head_dim) : model.head_dim;
    row_ = width * type.bytes;
    rows_ = {kv, model.head_dim, row_, context_length};
    const char* lengths = native_ ? "past_lengths" : "attention_mask";
    session_ = std::make_unique<Session>(bundle, bundle.manifest().graph_file, options.onnxruntime, threads);
    engine = "onnxruntime " + session_->library().version;
    std::string why;
    if (const Kernels* kernels = native_ ? ChooseKernels(&why) : nullptr) isa = kernels->name;
    session_->check_graph(bundle, lengths);
    graph_ = std::make_unique<BoundGraph>(*session_, weights_, chunk, vocab_size);
    const std::uint64_t bytes = checked_bytes(
        {std::uint64_t(heads_), std::uint64_t(context_length), std::uint64_t(row_)});
    for (const auto& names : kv_names(model.num_layers)) {
      caches_.emplace_back(bytes);
      graph_->bind_cache(names, caches_.back(), {1, heads_, context_length, width}, type.element);
    }
    if (native_) graph_->bind_input(lengths, &length_, sizeof length_, {1}, ort::kInt64);
    else mask_ = std::make_unique<Untouched>(8 * context_length);
  }

  const float* decode(std::int32_t token) override {
    check_fits(&token, 1);
    check_cancelled();
    const float* logits = prefill_step(&token, 1, true);
    ++position_;
    return logits;
  }

  void write_cache(std::int64_t length, const std::function<void(const void*, std::size_t)>& write) override {
    require_length(length, position_, "cached tokens");
    std::vector<unsigned char> rows(native_ ? std::size_t(length * row_) : 0);
    for (std::size_t i = 0; i < caches_.size(); ++i) {
      for (std::int64_t head = 0; head < heads_; ++head) {
        const unsigned char* at = head_cache(i, head);
        if (native_) rows_.pack(i % 2 == 0, at, length, rows.data());
        write(native_ ? rows.data() : at, std::size_t(length * row_));
      }
    }
  }

  void read_cache(std::int64_t length, const std::function<void(void*, std::size_t)>& read) override {
    require_length(length, context_length, "positions of the context");
    position_ = 0;  // if `read` throws, nothing is cached
    std::vector<unsigned char> rows(native_ ? std::size_t(length * row_) : 0);
    for (std::size_t i = 0; i < caches_.size(); ++i) {
      for (std::int64_t head = 0; head < heads_; ++head) {
        unsigned char* at = head_cache(i, head);
        read(native_ ? rows.data() : at, std::size_t(length * row_));
        if (native_) rows_.unpack(i % 2 == 0, at, length, rows.data());
      }
    }
    mark(0, length);
    position_ = length;
  }

  std::uint64_t cache_bytes(std::int64_t length) const override {
    return checked_bytes({caches_.size(), std::uint64_t(heads_), std::uint64_t(length), std::uint64_t(row_)});
  }

  void cancel() override {
    Runtime::cancel();
    graph_->cancel();
  }

  void resume() override {
    Runtime::resume();
    graph_->resume();
  }

 protected:
  const float* prefill_step(const std::int32_t* ids, std::int64_t count, bool) override {
    return step(ids, count, false);
  }

  const float* prefill_all(const std::int32_t* ids, std::int64_t count) override { return step(ids, count, true); }

 private:
  const float* step(const std::int32_t* ids, std::int64_t count, bool all_positions) {
    length_ = position_;
    if (!native_) {
      const std::int64_t end = position_ + count;
      mark(position_, end);
      graph_->bind_input("attention_mask", mask_->data(), std::uint64_t(8 * end), {1, end}, ort::kInt64);
    }
    return graph_->step(ids, count, all_positions);
  }

  // Set the portable mask for positions [begin, end).
  void mark(std::int64_t begin, std::int64_t end) {
    if (native_) return;
    std::int64_t* mask = reinterpret_cast<std::int64_t*>(mask_->data());
    std::fill(mask + begin, mask + end, std::int64_t(1));
  }

  // One head's keys (of an even index) or values.
  unsigned char* head_cache(std::size_t index, std::int64_t head) const {
    return caches_[index].data() + head * context_length * row_;
  }

  // The weights file as the manifest has it: it may have been truncated since the bundle was opened.
  void require_whole(const Bundle& bundle) const {
    const std::uint64_t size = bundle.manifest().files.at(bundle.manifest().weights_file).size;
    if (weights_.size() >= size) return;
    fail(EDGELM_BUNDLE, bundle.file(bundle.manifest().weights_file), " has ", weights_.size(),
         " bytes, the manifest says ", size, ": copy or export the bundle again");
  }

  static void require_length(std::int64_t length, std::int64_t most, const char* what) {
    if (length >= 0 && length <= most) return;
    fail(EDGELM_INVALID_ARGUMENT, length, " tokens of the KV cache: give 0 to ", most, ", the number of ", what);
  }

  ReturnsMemory last_;
  bool native_;
  MappedFile weights_;
  std::int64_t heads_ = 0, row_ = 0;  // bytes of a head's keys of one token
  CacheRows rows_ = {};
  std::int64_t length_ = 0;          // input past_lengths
  std::unique_ptr<Untouched> mask_;  // input attention_mask
  std::vector<Untouched> caches_;
  std::unique_ptr<Session> session_;
  std::unique_ptr<BoundGraph> graph_;
};

}  // namespace

std::int64_t native_row_bytes(const std::string& kv, std::int64_t head_dim) {
  if (kv == "float32") return 4 * head_dim;
  if (kv == "float16") return 2 * head_dim;
  if (kv == "int8") return head_dim + 4;
  if (kv == "fp8") return head_dim + 2;
  fail(EDGELM_INVALID_ARGUMENT, "kv is ", quoted(kv), ": the KV cache can be float32, float16, int8, fp8");
}

PortableType portable_type(const Bundle& bundle) {
  const std::string& kind = bundle.manifest().kv_dtype;
  if (kind == "float32") return {ort::kFloat, 4};
  if (kind == "float16") return {ort::kFloat16, 2};
  fail(EDGELM_BUNDLE, bundle.path(), " has a ", kind,
       " cache, and portable operators support float32, float16: export it again");
}

std::unique_ptr<Runtime> open_cpu_runtime(const Bundle& bundle, const RuntimeOptions& options) {
  return std::make_unique<CpuRuntime>(bundle, options);
}

}  // namespace edgelm::capi
