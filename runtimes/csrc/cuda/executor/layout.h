// Memory of a program on a device: offsets of caches, values and workspace in one block, and its nodes for launch
// planning. As `Layout` of runtimes/cuda/executor.py and runtimes/cuda/operators.py.
#pragma once

#include <map>
#include <set>
#include <string>
#include <utility>
#include <vector>

#include "cuda/executor/program.h"
#include "cuda/host/node.h"

namespace edgelm::gpu {

// What memory is reserved for.
struct Sizes {
  i64 batch;       // sequences
  i64 capacity;    // tokens of each cache; rounded up
  i64 tokens;      // the most new tokens of a step, over all sequences
  i64 logits;      // the most positions of a step whose logits are computed
  std::string kv;  // type of the caches: float16, bfloat16, float32, int8 or fp8
};

// The size of a step: `batch` sequences of `tokens` new tokens each.
struct StepSize {
  i64 batch, tokens;
  i64 rows() const { return batch * tokens; }
};

// The cache of one attention node.
struct CacheShape {
  std::string key, value;  // names
  i64 heads, size;         // KV heads, values of a head
};

class Layout {
 public:
  // `kept`: values that stay until the end of a step. All others share memory once their last reader has run. The
  // program must live as long. Throws Error: kOther if `kv` is no type of cache, otherwise as launch planning.
  Layout(const Program& program, const Sizes& sizes, const DeviceInfo& device, const std::set<std::string>& kept = {});

  const Program& program() const { return program_; }
  const Sizes& sizes() const { return sizes_; }
  const DeviceInfo& device() const { return device_; }
  i64 capacity() const { return capacity_; }
  u64 bytes() const { return end_; }
  // Bytes of caches, of values with logits, and of the workspace.
  u64 cache_bytes() const { return caches_; }
  u64 other_bytes() const { return end_ - caches_; }

  u64 lengths = 0, ids = 0, next_ids = 0, workspace = 0, counters = 0;  // offsets
  u64 counter_bytes = 0;
  u64 offset(const std::string& name) const { return offsets_.at(name); }
  bool has(const std::string& name) const { return offsets_.count(name) != 0; }

  const std::vector<CacheShape>& caches() const { return cache_shapes_; }
  u64 sequence_bytes(const CacheShape& cache) const;  // of one sequence's key cache; of its value cache as many
  // Bytes of codes of one head and token, and of its scale behind all codes; 0: none.
  u64 code_bytes(const CacheShape& cache) const;
  u64 scale_bytes() const { return sizes_.kv == "int8" || sizes_.kv == "fp8" ? 4 : 0; }

  // A node for launch planning; its addresses are 0.
  Node node(std::size_t index, const StepSize& step) const;
  // Its launches, once it has addresses.
  Launches launches(const Node& node, u64 workspace_address, u64 counters_address) const;
  KernelNames kernels() const;  // that steps may launch

 private:
  u64 take(u64 bytes);
  void place_caches();
  void place_values(const std::set<std::string>& kept);
  void place_workspace();
  Tensor tensor(const ProgramNode& node, const std::string& name, const StepSize& step) const;
  std::vector<std::size_t> kinds() const;  // one node of those that differ only in names

  const Program& program_;
  Sizes sizes_;
  DeviceInfo device_;
  i64 capacity_;
  u64 end_ = 0, caches_ = 0;
  std::map<std::string, u64> offsets_;
  std::vector<CacheShape> cache_shapes_;
  std::vector<Fields> fields_;  // of each node
};

}  // namespace edgelm::gpu
