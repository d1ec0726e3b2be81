// Launches of the kernels in moe.cuh: router, choice of experts, sorting by expert, weighted sum; and of SparseMoE,
// which puts them around the grouped matmuls of linear.cuh.
#pragma once

#include <string>

#include "cuda/host/kernels.h"
#include "cuda/host/linear.h"
#include "cuda/host/matrix.h"

namespace edgelm::gpu {

// The shape of an MoE layer, with the letters of moe.cuh.
struct MoeShape {
  i64 tokens;                       // M, over all sequences
  i64 columns;                      // D, columns of x; a multiple of 8
  i64 hidden;                       // F, columns inside an expert
  i64 experts;                      // E, 1 to 256
  i64 k;                            // experts for each token, 1 to 16 and at most E
  bool normalize = false;           // whether a token's weights are divided by their sum
  std::string activation = "bf16";  // type of the experts' activations: bf16, f16, or f32 for the exact kernels
  float epsilon = 1e-5f;            // of the norm

  // Throw Error if the kernels cannot compute this.
  void check() const;

  i64 slots() const { return tokens * k; }  // (token, expert) pairs
  // The largest number of experts that can have tokens.
  i64 most_active() const { return experts < slots() ? experts : slots(); }
  i64 blocks() const;  // of 32 tokens
};

// Addresses of intermediate results. They are int32 or float32 unless stated otherwise.
struct MoeWorkspace {
  u64 logits;                          // [M, E]
  u64 normed;                          // [M, D] of the activation's type, RMSNorm(x)
  u64 chosen, chosen_weights, counts;  // [M, k], [M, k] and [ceil(M / 32), E]; used between two kernels only
  u64 offsets;                         // [E + 1], the first slot of each expert
  u64 row_map;                         // [M k], the token of each slot
  u64 slot_weights;                    // [M k], the weight of each slot
  u64 slot_of;                         // [M, k], a token's slots in ascending order, which is the order of its experts
  u64 active;   // [1 + min(E, M k), 4], the number of experts that have tokens, then index, first slot, slots of each
  u64 hidden;   // [M k, F] of the activation's type, the result of gate and up
  u64 outputs;  // [M k, D], the result of down

  // Lay out `bytes(shape)` bytes at `address`. Parts are aligned to 256 bytes if `address` is.
  static MoeWorkspace at(const MoeShape& shape, u64 address);
  // They never decrease with more tokens.
  static u64 bytes(const MoeShape& shape);
};

// A call of the operator: shape, the formats of the experts' two blobs, and `rounding` of their matmuls (Matmul).
struct SparseMoe {
  MoeShape shape;
  Matrix gate_up, down;
  float rounding = 0;

  // Throw Error if the kernels cannot compute this.
  void check() const;
  // Whether the down matmul and the weighted sum are one launch.
  bool fuses_down() const;
};

// Addresses on the device.
struct SparseMoeBuffers {
  u64 x;              // float32 [M, D]
  u64 norm;           // float32 [D]
  u64 router;         // float32 [E, D]
  u64 gate_up, down;  // the experts' weights
  u64 y;              // float32 [M, D], written; may be x
  u64 workspace;      // `sparse_moe_workspace_bytes` of scratch memory
  u64 logits = 0;     // float32 [M, E], receives the router's logits; 0: not needed
  u64 counters = 0;   // kMoeCounterBytes of zeros, or 0. The launches reset them. They save a launch for few tokens
};
constexpr i64 kMoeCounterBytes = 4;

u64 sparse_moe_workspace_bytes(const SparseMoe& call);
Launches sparse_moe_launches(const SparseMoe& call, const SparseMoeBuffers& buffers, const DeviceInfo& device);
// Every kernel that such a call may launch, for any number of tokens.
KernelNames sparse_moe_kernels(const SparseMoe& call);

}  // namespace edgelm::gpu
