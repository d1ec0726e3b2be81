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
  int share;  // columns of RMSNorm(x) that a block of the router for few tokens writes
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
  Divisor k_divisor;
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
  int tokens, columns, hidden_columns, k;
  int pairs;              // tokens * k
  int most_active;        // min(experts, slots)
  int split_bits;         // 2^split_bits warps share an expert's rows; each takes a part of the columns of hidden
  int tiles;              // of 16 rows of a matrix
  int group, groups;      // columns per scale, and scales per row
  Divisor group_divisor;  // group
};

constexpr int kDownThreads = 512, kDownWarps = kDownThreads / 32;
constexpr int kDownRows = 8;  // of an expert's rows of hidden that a warp stages; the others are read from memory

// Sizes of a kernel moe_down, and the layout of its shared memory. A warp works in rounds of some tiles.
struct DownSizes {
  int round, columns;       // of a round: tiles, their columns
  int pitch;                // bytes from a staged row of hidden to the next; ldmatrix reads 8 of them from all banks
  int groups, group_bytes;  // of a round: groups of constant size; bytes of a group's scales
  int stride;               // floats per token of 16 results, padded against bank conflicts
  bool overlaid;            // the results take the place of hidden
  // Offsets: [warps][8 rows of hidden], [warps][8 N][stride] results, [warps]{first slot, slots},
  // [warps]{scales, zero points} of two rounds, [tokens, k]{slot, weight}.
  int results, slots, scales, pairs;
  int warp_scales;  // bytes of a warp's scales and zero points
};

// For weights with `tile_columns` columns in a tile and scales of `scale_bytes` (2: integers, which may have zero
// points), up to 8 n tokens, and groups of `group` columns; 0: no scales, or of any size, which are not staged.
EDGELM_CONSTEXPR DownSizes down_sizes(int tile_columns, int scale_bytes, int n, int group) {
  DownSizes s{};
  s.round = tile_columns == 64 || n == 4 ? 4 : 8;  // registers for no more
  s.columns = s.round * tile_columns;
  s.pitch = s.columns * 2 + 16;
  s.groups = group ? s.columns / group : 0;
  s.group_bytes = 16 * scale_bytes;
  s.stride = 20;
  s.overlaid = n == 4;  // there is no room for both; it costs a barrier
  s.warp_scales = 2 * s.groups * (s.group_bytes + (scale_bytes == 2 ? 16 : 0));
  const int hidden = kDownWarps * kDownRows * s.pitch, results = kDownWarps * 8 * n * s.stride * 4;
  s.results = s.overlaid ? 0 : hidden;
  s.slots = s.overlaid && results < hidden ? hidden : s.results + results;
  s.scales = s.slots + kDownWarps * 8;
  s.pairs = s.scales + kDownWarps * s.warp_scales;
  return s;
}

}  // namespace edgelm
