// Launches of the kernels in attention.cuh: GroupQueryAttention with its KV cache.
//
// docs/reference/operators.md defines the operator. Here qkv and the result are bfloat16, float16 or float32. A cache is
// bytes [B, G, C, R]: for one sequence and head C * S codes, then, for int8 and fp8, C float32 scales.
//
// | new tokens | launches |
// |---|---|
// | T * H / G <= 16 rows, `counters` given | 1: decode, which also prepares queries, keys and values |
// | T * H / G <= 16 rows | 2: prepare, split |
// | more | 2: prepare, prefill (64 rows per block) or, with many rows, wide (128) |
// | float32 | 2: prepare, exact |
//
// Lengths stay on the device: grids depend on shapes only, so that a CUDA graph can be replayed as the cache grows.
#pragma once

#include <string>

#include "cuda/host/kernels.h"

namespace edgelm::gpu {

// The shape of one call of the operator.
struct AttentionShape {
  i64 batch;                // sequences, B
  i64 tokens;               // new tokens of each, T, padding included
  i64 heads, kv_heads;      // H; G, which divides H
  i64 size;                 // head size, S: 32, 64 or 128
  i64 capacity;             // tokens that the cache has room for, C; a multiple of 4 for int8 and fp8
  i64 positions;            // rows of the rotary tables, at least C
  std::string activations;  // type of qkv and the result: bf16, f16, or f32 (with an f32 cache)
  std::string cache;        // type of the cache: bf16, f16, int8, fp8, or f32

  // Throws Error if there are no kernels for the shape.
  void check() const;
  i64 rows() const { return tokens * heads / kv_heads; }  // per sequence and KV head
  bool few() const;                                       // whether the kernels for few rows are used
  u64 counter_bytes() const { return u64(4 * batch * kv_heads); }
};

// Addresses on the device; 0 for an absent buffer.
struct AttentionBuffers {
  u64 qkv;                       // A [B, T, (H + 2 G) S]
  u64 key_cache, value_cache;    // bytes [B, G, C, R], updated in place
  u64 past_lengths;              // int32 [B]; past + new tokens must not exceed C; tokens beyond are dropped
  u64 cos, sin;                  // float32 [positions, S / 2]
  u64 out;                       // A [B, T, H S]
  u64 workspace;                 // attention_workspace_bytes of scratch memory
  u64 q_norm, k_norm;            // float32 [H S] and [G S], or [S] where per head; or 0: both or none
  u64 new_lengths;               // int32 [B], or 0: all T are new
  u64 counters;                  // counter_bytes of zeros, which the kernels leave as zeros, or 0. Only calls on one
                                 // stream may share them. They save a launch for few rows.
  u64 prefetch, prefetch_bytes;  // weights that the next launch reads, to be requested for L2; 0: none
  bool q_norm_per_head, k_norm_per_head;  // the norm weight is that of one head; each head is normed separately
};

// How one call is computed.
struct AttentionOptions {
  double epsilon = 1e-5;  // of the norms
  double clip = 0;        // queries, keys and values are clamped to -clip .. clip after the norms; 0: no clamp
  double scale = 0;       // of the scores; 0: 1 / sqrt(S)
  i64 splits = 0;         // of the keys; 0: chosen by shape and device
};

// Return the launches of one GroupQueryAttention. Throws Error if a buffer is missing or there are no kernels.
Launches attention_launches(const AttentionShape& shape, const AttentionBuffers& buffers, i64 multiprocessors,
                            const AttentionOptions& options);

// Return the bytes of scratch memory. They do not grow with T monotonically.
u64 attention_workspace_bytes(const AttentionShape& shape, i64 multiprocessors, i64 splits = 0);

// Return the bytes of a cache per head and token. Throws Error if `kind` is not a type of cache.
i64 attention_row_bytes(const std::string& kind, i64 size);

// Return all kernels that a model with this head size needs, for any number of tokens.
KernelNames attention_kernels_of(const std::string& activations, const std::string& cache, i64 size);

}  // namespace edgelm::gpu
