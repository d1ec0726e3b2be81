// Launches of SparseMoE: the kernels of moe.cuh around the grouped matmuls of linear.cuh.
#pragma once

#include "cuda/host/operators/linear.h"
#include "cuda/host/operators/moe.h"

namespace edgelm::gpu {

// A call of the operator: shape, the formats of the experts' two blobs, and `rounding` of their matmuls (Matmul).
struct SparseMoe {
  MoeShape shape;
  Matrix gate_up, down;
  float rounding = 0;

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
