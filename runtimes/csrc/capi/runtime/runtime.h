// What computes logits: ONNX Runtime on the CPU, or EdgeLM's kernels on a GPU. As edgelm/runtimes/base.py.
#pragma once

#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <vector>

#include "capi/bundle/bundle.h"

namespace edgelm::capi {

struct RuntimeOptions {
  std::string runtime;              // empty: the one for the bundle's target
  std::string onnxruntime;          // path of its library; empty: see edgelm.h
  int threads = 0;                  // 0: the physical cores that this process may use
  std::int64_t context_length = 0;  // 0: the model's, at most 4096
  std::int64_t chunk = 0;           // 0: 512, on a GPU 2048
  std::string kv;                   // empty: the bundle's
};

// A model on a device, with the KV cache of one sequence. One thread at a time uses it, `cancel` excepted. Logits are
// float32 [vocab_size], valid until the next call.
class Runtime {
 public:
  virtual ~Runtime() = default;

  std::string name;  // "onnxruntime-cpu", "cuda-kernels"
  std::string kv;
  std::string engine;  // what computes and its version, "onnxruntime 1.31.1"; empty: EdgeLM itself
  std::string isa;     // instruction set of the native operators' kernels; empty without these
  std::int64_t vocab_size = 0, context_length = 0, model_context_length = 0, chunk = 0;
  int threads = 0;

  std::int64_t position() const { return position_; }  // cached tokens

  // Append ids, `chunk` at a time; return the logits after the last. Throws Error(EDGELM_CONTEXT_FULL) or
  // EDGELM_INVALID_ARGUMENT before anything is appended, EDGELM_CANCELLED with whole chunks appended.
  const float* prefill(const std::vector<std::int32_t>& ids);
  // Append one token; return the logits after it.
  virtual const float* decode(std::int32_t token) = 0;
  // Append one token; return the argmax after it: of equal logits the first. A GPU copies only the token back. Throws
  // Error(EDGELM_RUNTIME) if the highest logit is not finite.
  virtual std::int32_t decode_greedy(std::int32_t token);
  // Append ids; call `block(logits, rows)` for blocks [rows, vocab_size] in order, of at most 64 MiB.
  void logits_all(const std::vector<std::int32_t>& ids,
                  const std::function<void(const float* logits, std::int64_t rows)>& block);
  // Keep the first `length` cached tokens.
  void truncate(std::int64_t length);

  // The cache of the first `length` tokens as bytes, in an order that depends on the model's shape and the type of the
  // cache only: layer by layer keys, then values, head by head, position by position. `read` fills in what `write` wrote,
  // and sets the position.
  virtual void write_cache(std::int64_t length, const std::function<void(const void*, std::size_t)>& write) = 0;
  virtual void read_cache(std::int64_t length, const std::function<void(void*, std::size_t)>& read) = 0;
  virtual std::uint64_t cache_bytes(std::int64_t length) const = 0;  // of these bytes

  // From any thread: the running call throws Error(EDGELM_CANCELLED) soon. `resume` before the next one.
  virtual void cancel() { cancelled_ = true; }
  virtual void resume() { cancelled_ = false; }

 protected:
  // Run ids, at most `chunk`, after the cached ones; the caller updates the position. Logits are used only if `last`.
  virtual const float* prefill_step(const std::int32_t* ids, std::int64_t count, bool last) = 0;
  // The same with logits [count, vocab_size].
  virtual const float* prefill_all(const std::int32_t* ids, std::int64_t count) = 0;
  void check_fits(const std::int32_t* ids, std::size_t count) const;
  void check_cancelled() const;

  std::int64_t position_ = 0;
  std::atomic<bool> cancelled_{false};
};

// Load a bundle. Throws Error(EDGELM_UNAVAILABLE), EDGELM_BUNDLE, EDGELM_INVALID_ARGUMENT or EDGELM_RUNTIME.
std::unique_ptr<Runtime> open_runtime(const Bundle& bundle, const RuntimeOptions& options);

// The bundle's debug graph, for the parity check; as edgelm/runtimes/tracing.py.
class Tracing {
 public:
  virtual ~Tracing() = default;
  // Run ids [batch, tokens] from position 0; return the outputs `names`, each float32 with its shape.
  struct Value {
    std::vector<std::int64_t> shape;
    std::vector<float> data;
  };
  virtual std::vector<Value> run(const std::int32_t* ids, std::int64_t batch, std::int64_t tokens,
                                 const std::vector<std::string>& names, bool logits) = 0;
};

// nullptr if the runtime has no debug graph.
std::unique_ptr<Tracing> open_tracing(const Bundle& bundle, const RuntimeOptions& options);

}  // namespace edgelm::capi
