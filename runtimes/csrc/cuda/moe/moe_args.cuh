// Arguments of the kernels of SparseMoE.
#pragma once

#include "types.cuh"

namespace edgelm {

struct MoeRouterArgs {
  const float* x;       // [tokens, columns]
  const float* norm;    // [columns]
  const float* router;  // [experts, columns]
  float* logits;        // [tokens, experts]
  void* normed;         // [tokens, columns] of A: RMSNorm(x)
  int tokens, columns, experts;
  float epsilon;
};

struct MoeChooseArgs {
  const float* logits;    // [tokens, experts]
  int* chosen;            // [tokens, k], from choose_many to place: expert * 32 + rank among its tokens in the block
  float* chosen_weights;  // [tokens, k], written by choose_many, read by place
  int* counts;            // [blocks of 32 tokens, experts], the same
  int* offsets;           // [experts + 1]: the first slot of each expert
  int* row_map;           // [slots]: the slot's token
  float* slot_weights;    // [slots]
  int* slot_of;           // [tokens, k]: a token's slots, ascending
  int* active;            // [1 + min(experts, slots), 4]: {number of experts that have tokens}, then for each of these
                          // in order {index, first slot, slots}, then zeros
  int tokens, experts, k, normalize;
};

struct MoeRouteArgs {
  MoeRouterArgs router;
  MoeChooseArgs choose;
  int* counter;  // must be 0; is 0 again at the end
};

struct MoeCombineArgs {
  const float* x;             // [tokens, columns]
  const float* outputs;       // [slots, columns]
  const float* slot_weights;  // [slots]
  const int* slot_of;         // [tokens, k], ascending
  float* y;                   // [tokens, columns]; may be x
  int tokens, columns, k;
};

struct MoeDownArgs {
  const void* hidden;  // [slots, hidden_columns] of A
  const u8* codes;     // the experts' matrices [columns, hidden_columns] in tiles
  const u8* scales;
  const u8* zeros;    // null: symmetric
  const int* active;  // this and the next as in MoeChooseArgs
  const float* slot_weights;
  const int* slot_of;
  const float* x;  // [tokens, columns]
  float* y;        // [tokens, columns]; may be x
  i64 codes_stride, scales_stride, zeros_stride;
  int tokens, columns, hidden_columns, group, k;
  int most_active;  // min(experts, slots)
  int split;        // warps that share an expert's rows; each takes a part of the columns of hidden
};

}  // namespace edgelm
