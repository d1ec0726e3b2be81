// A graph of a bundle in ONNX Runtime: loaded, checked against the manifest, and run with bound buffers. As
// edgelm/runtimes/onnxruntime/session.py.
#pragma once

#include <atomic>
#include <initializer_list>
#include <memory>
#include <string>
#include <utility>
#include <vector>

#include "capi/common/files.h"
#include "capi/runtime/onnxruntime/library.h"

namespace edgelm::capi {

// Zeros whose pages take memory only when they are written. Throws Error(EDGELM_RUNTIME) if there is not enough.
class Untouched {
 public:
  explicit Untouched(std::uint64_t bytes);
  Untouched(Untouched&& other) noexcept : data_(std::exchange(other.data_, nullptr)), bytes_(other.bytes_) {}
  Untouched(const Untouched&) = delete;
  ~Untouched();

  unsigned char* data() const { return data_; }
  std::uint64_t bytes() const { return bytes_; }

 private:
  unsigned char* data_;
  std::uint64_t bytes_;
};

// `a * b`; throws Error(EDGELM_RUNTIME) if it is beyond any memory.
std::uint64_t checked_bytes(std::initializer_list<std::uint64_t> factors);

// Names of all caches, each as input and as output, of one layer after the other: keys, then values.
std::vector<std::pair<std::string, std::string>> kv_names(std::int64_t layers);

// A loaded graph.
class Session {
 public:
  // Load `file` of the bundle; native operators are registered if the bundle has them. Throws Error(EDGELM_BUNDLE) if the
  // graph cannot be loaded, Error(EDGELM_UNAVAILABLE) if the library is missing or too old, or if EDGELM_ISA cannot be
  // followed.
  Session(const Bundle& bundle, const std::string& file, const std::string& onnxruntime, int threads);

  // Throws Error(EDGELM_BUNDLE) if the graph lacks inputs or outputs of a runtime, or has other sizes than the manifest.
  // `lengths`: the input with the number of cached tokens.
  void check_graph(const Bundle& bundle, const std::string& lengths,
                   const std::vector<std::string>& more_outputs = {}) const;

  const OrtLibrary& library() const { return library_; }
  OrtSession* get() const { return session_.get(); }
  OrtAllocator* allocator() const { return allocator_; }

  // A tensor in memory of the caller's, which outlives it.
  OwnedValue tensor(void* data, std::uint64_t bytes, const std::vector<std::int64_t>& shape, int type) const;

  // A tensor's data and shape, and that it is float32; throws Error(EDGELM_BUNDLE) otherwise.
  const float* floats(OrtValue* value, std::vector<std::int64_t>* shape) const;

 private:
  // The size of an axis of an input or output; -1 if the graph does not state it. A negative axis counts from the last.
  std::int64_t size_of_axis(bool output, std::size_t index, int axis) const;

  const OrtLibrary& library_;
  std::shared_ptr<OwnedEnv> env_;
  OwnedSession session_;
  OwnedMemoryInfo memory_;
  OrtAllocator* allocator_ = nullptr;
};

// A session with buffers for one sequence that are bound once and reused.
class BoundGraph {
 public:
  BoundGraph(const Session& session, const MappedFile& weights, std::int64_t chunk, std::int64_t vocab_size);

  void bind_input(const std::string& name, void* data, std::uint64_t bytes, const std::vector<std::int64_t>& shape,
                  int type);
  // Bind a cache as both the graph's past and its present, so that a step updates it in place.
  void bind_cache(const std::pair<std::string, std::string>& names, const Untouched& cache,
                  const std::vector<std::int64_t>& shape, int type);

  // Run `count` ids; return the logits of the last position, or of all. The next step overwrites them. Throws
  // Error(EDGELM_BUNDLE) if the weights file was truncated, EDGELM_CANCELLED after `cancel`, EDGELM_RUNTIME if ONNX
  // Runtime fails.
  const float* step(const std::int32_t* ids, std::int64_t count, bool all_positions);

  // From any thread: end the running step, and refuse later ones until `resume`.
  void cancel();
  void resume();

 private:
  void bind_logits(bool allocated);
  // The logits that ONNX Runtime allocated, [1, count, vocab_size].
  const float* allocated_logits(std::int64_t count);

  const Session& session_;
  const MappedFile& weights_;
  const OrtLibrary& library_;
  std::int64_t vocab_size_;
  std::vector<std::int64_t> ids_;
  std::int64_t start_ = 0, bound_ids_ = 0;
  std::vector<float> logits_;
  bool logits_allocated_ = true;
  std::atomic<bool> cancelled_{false};
  OwnedMemoryInfo memory_;
  OwnedRunOptions short_, long_;
  OwnedBinding binding_;
  OwnedValue all_;
};

}  // namespace edgelm::capi
