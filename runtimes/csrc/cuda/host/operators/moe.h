// Launches of the kernels in moe.cuh: router, choice of experts, sorting by expert, weighted sum. sparse_moe.h puts
// them together.
#pragma once

#include <string>

#include "cuda/host/kernels.h"
#include "cuda/host/matrix.h"

namespace edgelm::gpu {

class Fields;

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

  // Read the fields tokens, columns, ..., and check them.
  static MoeShape of(const Fields& fields);
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

// The kernels' launches one by one. Addresses are those of SparseMoeBuffers and MoeWorkspace.
//
// Logits and normed rows. `tile`: 8, 16 or 32 tokens of a block of the tiled kernel; 0: the kernel is chosen by tokens.
Launch moe_router_launch(const MoeShape& shape, u64 x, u64 norm, u64 router, u64 logits, u64 normed, i64 tile = 0);
// Choice of experts and sorting: one launch up to 32 tokens, two for more. offsets, row_map, slot_weights, slot_of and
// active of `places` are written.
Launches moe_choose_launches(const MoeShape& shape, u64 logits, const MoeWorkspace& places);
// Both. Up to 32 tokens it is one launch, with `counter`: an int32 that is 0, and is 0 again when the launch has ended.
Launches moe_route_launches(const MoeShape& shape, u64 x, u64 norm, u64 router, u64 logits, const MoeWorkspace& places,
                            u64 counter);
// y = x + weighted sum of the experts' outputs.
Launch moe_combine_launch(const MoeShape& shape, u64 x, u64 outputs, u64 slot_weights, u64 slot_of, u64 y);
// y = x + weighted sum of the experts' down matmuls, for up to 32 tokens and 16-bit activations. `matrix`: the experts'
// matrices [D, F], `weights` their blob. Throws Error if there is no kernel for it, or the matrix does not fit.
Launch moe_down_launch(const MoeShape& shape, const Matrix& matrix, u64 weights, u64 x, u64 hidden,
                       const MoeWorkspace& places, u64 y);
constexpr i64 kDownTokens = 32;  // for up to so many tokens there is moe_down
// The kernels that it may launch, for any number of tokens.
KernelNames moe_down_kernels(const std::string& activation, const Matrix& matrix);

// The kernel names that choose experts contain it: the experts that there are at most, 32, 64, 128 or 256.
i64 moe_expert_limit(i64 experts);

}  // namespace edgelm::gpu
