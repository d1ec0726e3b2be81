// A node of a program and its launches: what the Python executor and the TensorRT plugins run.
#pragma once

#include <string>
#include <vector>

#include "cuda/host/fields.h"
#include "cuda/host/kernels.h"

namespace edgelm::gpu {

// A value, weight or cache of a node. `type`: f32, f16, bf16, int32, int8 or uint8. An absent input has no type.
struct Tensor {
  u64 address = 0;
  std::string type;
  std::vector<i64> dims;

  bool present() const { return !type.empty(); }
  i64 elements() const;  // exact up to 2^31 - 1, otherwise some larger number
};

// An operator of docs/reference/operators.md with the attributes that a bundle's program gives it.
//
// | operator | inputs |
// |---|---|
// | QuantEmbedding | ids, table |
// | QuantLinear | x, weights, norm, residual, bias |
// | GroupQueryAttention | qkv, key_cache, value_cache, past_lengths, cos, sin, q_norm, k_norm |
// | SparseMoE | x, router, gate_up, down, norm |
// | RMSNorm | x, weight, residual |
// | LastToken | x |
//
// The first input is [batch, tokens, ...]; x and qkv are [batch, tokens, width]. Caches are [batch, heads, capacity,
// bytes], the tables [positions, size / 2]. Of other inputs only presence and address count, and of q_norm and k_norm
// the number of elements. Outputs: the results that are used, of which only addresses count.
struct Node {
  std::string op, name;
  Fields attributes;
  std::vector<Tensor> inputs, outputs;

  // Read `op`, `name`, tensors as `input.0=ADDRESS:TYPE:D,D,D` and `output.0=...`; all fields are attributes, these
  // included. An input without a field is absent. Throws Error (kBundle) for an unknown operator or a damaged field.
  static Node of(const Fields& fields);

  // Absent (without a type) if the node has no such input or output.
  const Tensor& input(std::size_t index) const;
  const Tensor& output(std::size_t index) const;

  // Attributes; throw Error (kBundle), which names the node, if one is missing or no number. The type of the cache is
  // the attribute `kv`: float16, bfloat16, int8, fp8 or float32.
  const std::string& text(const std::string& key) const;
  i64 integer(const std::string& key) const;
  double number(const std::string& key) const;
};

// GroupQueryAttention has optional attributes `prefetch` and `prefetch_bytes`: address and size of the weights that the
// next node reads. Its launches may request a part of them for the L2 cache.
//
// Return the launches of a node; batch and tokens are the first dimensions of its first input.
//
// `workspace`: address of `scratch_bytes`, undefined between nodes. `counters`: of `counter_bytes` zeros, which the
// launches leave as zeros; 0: none, which costs more launches. Throws Error if the kernels cannot compute the node.
Launches launches(const Node& node, const DeviceInfo& device, u64 workspace, u64 counters);

// Return the bytes of workspace for steps of up to `tokens` tokens, over all sequences, of one and of `batch` sequences.
// Only types and presence of the inputs, the cache's capacity and the tables' positions count.
u64 scratch_bytes(const Node& node, const DeviceInfo& device, i64 batch, i64 tokens);
// Return the bytes of counters for the same steps.
u64 counter_bytes(const Node& node, i64 batch, i64 tokens);

// Return the names of the kernels that the node may launch, for any number of tokens, with its attribute `kv`.
KernelNames kernels(const Node& node);

}  // namespace edgelm::gpu
