// Arguments of the kernels of GroupQueryAttention.
#pragma once

#include "types.cuh"

namespace edgelm {

struct AttentionArgs {
  const void* qkv;  // A [B, T, (H + 2 G) S]
  u8* key_cache;    // [B, G, C, R], as is value_cache
  u8* value_cache;
  const i32* past_lengths;  // [B]
  const i32* new_lengths;   // [B], or null: T
  const float* cos;         // [positions, S / 2], as is sin
  const float* sin;
  const float* q_norm;  // [H S], or [S] where per_head_norms has kQueries; or null
  const float* k_norm;  // [G S], or [S] where it has kKeys; or null: both or none
  void* out;            // A [B, T, H S]
  void* queries;        // workspace: M [B, G, T, H / G, S]
  float* partials;      // workspace: [B, G, row_blocks, splits, rows of a block, S]
  float* totals;        // workspace: [B, G, row_blocks, splits, rows of a block, 2], maximum and sum
  i32* counters;        // [B, G, row_blocks], zeros; left as zeros
  i32 tokens, heads, kv_heads, capacity, positions, splits, row_blocks;
  float epsilon, clip, scale;
  float scale_base2;   // scale / ln 2: weights are powers of 2
  i32 per_head_norms;  // bits kQueries, kKeys: their norm weight is [S] and each head is normed by itself
  i32 shared_by;       // query heads of a KV head, H / G
  Divisor shared_by_divisor, splits_divisor;
  // Weights that the next launch certainly reads, of which blocks without keys request as much for L2; 0 bytes: none.
  const u8* prefetch;
  i64 prefetch_bytes;
};

constexpr i32 kQueries = 1, kKeys = 2;

}  // namespace edgelm
