// Runs a program on a device: its weights and other memory there, and the launches of steps. As `Executor` of
// runtimes/cuda/executor.py.
//
// A step has B sequences of T new tokens. Its launches depend on B, T and the size of the caches only: kernels read the
// number of cached tokens from device memory. So the launches of each shape are planned once, and those of a decode step
// are captured as a CUDA graph.
#pragma once

#include <functional>
#include <list>
#include <map>
#include <string>
#include <tuple>
#include <vector>

#include "cuda/executor/device.h"
#include "cuda/executor/layout.h"

namespace edgelm::gpu {

// A program's weights on a device: one allocation with the contents of the weights file.
class DeviceWeights {
 public:
  // Throws Error (kBundle) if the file is too short or cannot be read, DeviceMemoryError.
  DeviceWeights(Device& device, const Program& program, const std::string& path);
  u64 address(const std::string& name) const { return base_ + program_.weights.at(name).offset; }

 private:
  void upload(Device& device, const std::string& path, u64 bytes);

  const Program& program_;
  u64 base_ = 0;  // freed with the device
};

// Throws Error (kBundle) if a weights file is shorter than a program needs.
void check_weights_file(const Program& program, const std::string& path);

// What a step computes.
struct Step {
  const i32* ids;  // [batch, tokens]
  StepSize size;
  const i32* lengths;          // [batch], the cached tokens of each sequence
  bool all_positions = false;  // the logits of all positions, not only of the last
  bool greedy = false;         // the argmax of the logits, on the device
  bool graph = false;          // capture the step at the second call, and launch the CUDA graph from then on
};

class Executor {
 public:
  // `weights` and `layout` are of this device and must live as long. Loads the kernels. The memory is freed with the
  // executor. Throws DeviceMemoryError, and UnavailableError if a kernel is missing.
  Executor(Device& device, const DeviceWeights& weights, const Layout& layout);
  ~Executor();
  Executor(const Executor&) = delete;
  Executor& operator=(const Executor&) = delete;

  void run(const Step& step);
  // Copy a float32 value of the last step, rows [rows, width].
  void value(const std::string& name, i64 rows, float* out);
  void logits(i64 rows, float* out) { value("logits", rows, out); }
  // Copy the argmax tokens of the last step, which was greedy; -1 if every logit is NaN.
  void chosen(i64 rows, i32* out);

  // Copy the cache of a sequence's first `length` tokens: of each layer keys, then values, head by head the codes, then
  // the scales of these tokens.
  void write_cache(i64 sequence, i64 length, const std::function<void(const void*, std::size_t)>& write);
  void read_cache(i64 sequence, i64 length, const std::function<void(void*, std::size_t)>& read);
  u64 cache_bytes(i64 length) const;

 private:
  using Key = std::tuple<i64, i64, bool, bool>;  // batch, tokens, all positions, greedy
  using Plan = std::vector<LoadedLaunch>;

  void start_copies(const Step& step);
  void start_launches(const Key& key);
  void start_graph(const Key& key);
  const Plan& plan(const Key& key);
  Plan make_plan(const Key& key);
  u64 address(const std::string& name, const std::map<std::string, std::string>& renamed) const;
  void add_prefetch(std::size_t index, Node& node) const;
  void wait();
  template <class Part> void each_cache_part(i64 sequence, i64 length, const Part& part);

  Device& device_;
  const DeviceWeights& weights_;
  const Layout& layout_;
  u64 base_ = 0;
  u8* inputs_ = nullptr;  // pinned: lengths and ids, as on the device
  u8* chosen_ = nullptr;  // pinned
  bool pending_ = false;
  std::map<Key, Plan> plans_;
  std::list<Key> long_plans_;  // of more than one token, oldest first
  std::map<Key, void*> graphs_;
};

}  // namespace edgelm::gpu
